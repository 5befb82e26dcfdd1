// CPU kernel of the Jacobian kind by factors: all items of all layers of a call at once, products
// of matrices by the library. lwkd/ops/factors.py states the formulas.
//
// The two sums that a sample's distance needs, ‖U‖² and ⟨U, G_S⟩, hold for any c: a guess from the
// factors' own norms serves, and ‖cG_T‖² = ‖G_S‖² − 2⟨U, G_S⟩ + ‖U‖² says how good it was. Where it
// was so bad that digits are lost, the sample is done again with a better one.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "factor_sums.h"
#include "jacobian.h"

namespace lwkd {
namespace {

constexpr int64_t kScratch = 64 << 20;  // bytes of all threads together
constexpr double kLost = 0.5;           // of ‖U‖² along G_S: from there on c is mended
constexpr double kNoise = 1e-5;         // of one square: another that is less is rounding
constexpr int kRounds = 3;              // of mending

// What the factors' own norms say of a parameter and sample.
struct Guess {
  double c_a = 1, c = 1, weight = 0;
  bool apart = false;  // so far that G_S − cG_T can be taken of the gradients themselves
};

// ‖x‖², ‖y‖², ⟨x, y⟩ of a row, by a part of it where it is long.
template <typename A>
Sums sampled(const RowWalk& walk, int64_t n) {
  constexpr int64_t kPieces = 16;
  const int64_t length = walk.length, pieces = (length + kTile - 1) / kTile;
  const int64_t used = std::min(pieces, kPieces);
  alignas(64) A buffer[2][kTile];
  Sums sums{};
  int64_t seen = 0;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t begin = i * pieces / used * kTile, end = std::min(begin + kTile, length);
    seen += end - begin;
    const A* x = fetch(walk, 0, n, begin, end, buffer[0]);
    const A* y = fetch(walk, 1, n, begin, end, buffer[1]);
    double piece[3];
    products(x, y, end - begin, piece);
    for (int k = 0; k < 3; ++k) sums[k] += piece[k];
  }
  for (double& sum : sums) sum *= double(length) / std::max<int64_t>(seen, 1);
  return sums;
}

// c = ‖x‖/‖y‖, and ‖x − c·y‖/‖x‖ of it, or (not scaled) of c = 1.
std::pair<double, double> ratio_of(const Sums& sums, bool scaled) {
  const double xx = sums[0], yy = sums[1], xy = sums[2];
  const double c = scaled && xx > 0 && yy > 0 ? std::sqrt(xx / yy) : 1;
  const double left = xx - 2 * c * xy + c * c * yy;
  return {c, xx > 0 ? std::sqrt(std::max(left, 0.0) / xx) : 1};
}

struct Work {
  std::vector<Job> jobs;
  int64_t layers = 0, samples = 0;
  How how = kDifference;
  bool squares = false;  // what is wanted is ‖G_S‖²

  std::vector<Guess> guesses;  // [jobs, N]
  std::vector<double> c;       // [L, N]
  std::vector<char> active;    // [L, N]: to be done, or done again
  std::vector<Sums> sums;      // [L, N]

  int64_t at(int64_t row, int64_t n) const { return row * samples + n; }
};

template <typename A>
void guess(Work& work) {
  const bool scaled = work.how == kNormalized;
  std::vector<Block> blocks;
  for (const Job& job : work.jobs) {
    const int64_t read = job.walk_d->length + (job.walk_a ? job.walk_a->length : 0);
    blocks.push_back(whole_samples(work.samples, 2 * std::min<int64_t>(read, 1 << 17)));
  }
  parallel_tasks(blocks, [&](int64_t i, int64_t n, int64_t, int64_t) {
    const Job& job = work.jobs[i];
    Guess& out = work.guesses[work.at(i, n)];
    const Sums a = job.walk_a ? sampled<A>(*job.walk_a, n) : Sums{1, 1, 1};
    const Sums d = sampled<A>(*job.walk_d, n);
    const auto [c_a, apart_a] = ratio_of(a, scaled);
    const auto [c_d, apart_d] = ratio_of(d, scaled);
    out.c_a = static_cast<double>(static_cast<A>(c_a));
    out.c = out.c_a * c_d;
    out.weight = std::sqrt(a[0]) * std::sqrt(d[0]);
    out.apart = job.builds() && std::hypot(apart_a, apart_d) >= far_enough(job.student);
  });
  if (!scaled) return;
  std::vector<double> heaviest(work.c.size(), -1);
  for (size_t i = 0; i < work.jobs.size(); ++i)
    for (int64_t n = 0; n < work.samples; ++n) {
      const Guess& g = work.guesses[work.at(i, n)];
      const int64_t at = work.at(work.jobs[i].layer, n);
      if (!(g.weight > heaviest[at]) || !std::isfinite(g.c) || g.c <= 0) continue;
      heaviest[at] = g.weight, work.c[at] = g.c;
    }
}

// One pass over every sample that is to be done.
template <typename A>
void pass(Work& work) {
  std::vector<Block> blocks;
  std::vector<int64_t> first;
  int64_t tasks = 0, largest = 1;
  bool library = false;
  for (const Job& job : work.jobs) {
    library = library || job.library();
    const int64_t tiles = job.tiles();
    blocks.push_back({work.samples, tiles * kTile, tiles, job.cost(work.how), 0});
    first.push_back(tasks);
    tasks += blocks.back().tasks();
    largest = std::max(largest, job.scratch() * int64_t(sizeof(A)));
  }
  const std::unique_ptr<Sums[]> partial(new Sums[tasks]());
  const int64_t total = lay_out(blocks), threads = std::max<int64_t>(2, kScratch / largest);
  int64_t grain = std::max(kGrain, (total + threads - 1) / threads);
  // Whatever its size: inside a parallel region every product is one thread's, so that it is the
  // same however many there are.
  if (library) grain = OneThread::possible() ? (total + threads - 1) / threads : total;
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    const OneThread guard;
    Scratch<A> scratch;
    run_tasks(blocks, begin, end, [&](int64_t i, int64_t n, int64_t position, int64_t) {
      const Job& job = work.jobs[i];
      const int64_t at = work.at(job.layer, n), tile = position / kTile;
      if (!work.active[at]) return;
      const Guess& g = work.guesses[work.at(i, n)];
      const Ask ask{n, tile, work.how, !g.apart, work.c[at], g.c_a};
      partial[first[i] + n * blocks[i].tiles + tile] = job_sums<A>(job, ask, scratch);
    });
  });
  for (int64_t at = 0; at < work.layers * work.samples; ++at)
    if (work.active[at]) work.sums[at] = {};
  for (size_t i = 0; i < work.jobs.size(); ++i)
    for (int64_t n = 0; n < work.samples; ++n) {
      const int64_t at = work.at(work.jobs[i].layer, n);
      if (!work.active[at]) continue;
      for (int64_t tile = 0; tile < blocks[i].tiles; ++tile) {
        const Sums& from = partial[first[i] + n * blocks[i].tiles + tile];
        const int slot = work.jobs[i].slot;
        for (int k = 0; k < (work.how == kNorms ? 1 : 3); ++k) work.sums[at][k + slot] += from[k];
      }
    }
}

// D of one layer and sample; sets `mended` to a better c where digits were lost with this one.
double distance_of(const Sums& sums, How how, double c, double* mended) {
  if (how == kDifference) return sums[0];
  if (how == kNorms) {
    // Of a gram what is nothing may round below it.
    const double ns = std::sqrt(std::max(sums[0], 0.0)), nt = std::sqrt(std::max(sums[1], 0.0));
    const double whole = ns + nt;
    const double ratio = whole == 0 ? 0 : (ns - nt) / whole;
    return ratio * ratio;
  }
  const double uu = sums[0], us = sums[1], ss = sums[2] < 0 ? 0 : sums[2];
  double vv = ss - 2 * us + uu;  // v = c·G_T
  // c is so small that nothing is known of v, or so large that nothing is of G_S; or there is none.
  if (vv < kNoise * ss) *mended = c / std::sqrt(kNoise);
  if (ss < kNoise * vv) *mended = c * std::sqrt(kNoise);
  if (vv < 0) vv = 0;
  const double ns = std::sqrt(ss), nv = std::sqrt(vv), nt = nv / c;
  if (ns < kEps || nt < kEps) {
    const double a = std::max(ns, kEps), b = std::max(nt, kEps);
    const double most = ns * nt, tt = vv / (c * c);
    const double st = std::clamp((ss - us) / c, -most, most);
    const double d = ss / (a * a) + tt / (b * b) - 2 * (st / (a * b));
    return d < 0 ? 0 : d;
  }
  const double x = (2 * us - uu) / (ns + nv);
  if (*mended == 0 && x * x > kLost * uu) *mended = c * (ns / nv);
  const double d = (uu - x * x) / (ns * nv);
  return d < 0 ? 0 : d;
}

// Distances [L, N].
template <typename A>
std::vector<double> distances(Work& work) {
  std::vector<double> out(work.layers * work.samples);
  if (work.how != kNorms) guess<A>(work);
  for (int round = 0;; ++round) {
    pass<A>(work);
    std::vector<char> mend(out.size(), 0);
    for (size_t at = 0; at < out.size(); ++at) {
      if (!work.active[at]) continue;
      double c = 0;
      out[at] = work.squares ? std::max(work.sums[at][0], 0.0)
                             : distance_of(work.sums[at], work.how, work.c[at], &c);
      if (round < kRounds && c > 0 && std::isfinite(c)) work.c[at] = c, mend[at] = 1;
    }
    for (size_t i = 0; work.how != kNorms && i < work.jobs.size(); ++i)
      for (int64_t n = 0; n < work.samples; ++n) {
        // The gradients are closer than their factors were: stacked factors keep the digits.
        Guess& g = work.guesses[work.at(i, n)];
        const int64_t at = work.at(work.jobs[i].layer, n);
        if (!work.active[at] || !g.apart) continue;
        const Sums& sums = work.sums[at];
        const double close = work.how == kNormalized ? out[at] : sums[0] / sums[2];
        const double enough = far_enough(work.jobs[i].student) / 3;
        if (close < enough * enough) g.apart = false, mend[at] = 1;
      }
    work.active = mend;
    if (std::find(mend.begin(), mend.end(), 1) == mend.end()) return out;
  }
}

// --- the op --------------------------------------------------------------------------------------

Item read_item(const Tensor& a, const Tensor& d, const int64_t* form) {
  return form[0] == kConvolution ? read_convolution(a, d, form)
                                 : read_dense(a, d, form[0] == kIndices);
}

Tensor jacobian_factors(std::vector<Tensor> student_a, std::vector<Tensor> student_d,
                        std::vector<Tensor> teacher_a, std::vector<Tensor> teacher_d,
                        std::vector<int64_t> layers, std::vector<int64_t> forms,
                        std::vector<int64_t> contractions, int64_t how_number, bool mean) {
  FactorLists in{{student_a, teacher_a}, {student_d, teacher_d}, layers, forms, contractions};
  in.check(how_number);
  Work work;
  work.how = in.how, work.squares = in.squares;
  work.samples = in.samples;
  for (size_t i = 0; i < layers.size(); ++i) {
    Job job;
    job.layer = layers[i], job.gram = contractions[i] == 0;
    job.student = read_item(student_a[i], student_d[i], in.form(i, 0));
    Item teacher = read_item(teacher_a[i], teacher_d[i], in.form(i, 1));
    if (work.how == kNorms) {
      simplify(job.student, nullptr), simplify(teacher, nullptr);
      work.jobs.push_back(job);
      if (work.squares) continue;
      job.student = teacher, job.slot = 1;
      work.jobs.push_back(job);
      continue;
    }
    simplify(job.student, &teacher);
    job.teacher = teacher;
    const Tensor* s[2] = {&student_a[i], &student_d[i]};
    const Tensor* t[2] = {&teacher_a[i], &teacher_d[i]};
    const int64_t* form = in.form(i, 0);
    const int a = form[0] == kConvolution && form[2] ? 1 : 0;  // whose patches are taken
    if (form[0] != kIndices) job.walk_a.emplace(std::vector<const Tensor*>{s[a], t[a]});
    job.walk_d.emplace(std::vector<const Tensor*>{s[1 - a], t[1 - a]});
    work.jobs.push_back(std::move(job));
  }
  work.layers = in.length();
  work.guesses.resize(work.jobs.size() * work.samples);
  work.c.assign(work.layers * work.samples, 1);
  work.active.assign(work.layers * work.samples, 1);
  work.sums.resize(work.layers * work.samples);
  const bool wide = in.wide();
  const std::vector<double> d = wide ? distances<double>(work) : distances<float>(work);
  std::vector<int64_t> shape{work.layers};
  if (!mean) shape.push_back(work.samples);
  Tensor out = make(student_d[0], shape, wide);
  const auto conclude = [&](auto* to) {
    using A = std::remove_pointer_t<decltype(to)>;
    for (int64_t l = 0; l < work.layers; ++l) {
      double sum = 0;
      for (int64_t n = 0; n < work.samples; ++n) {
        sum += d[work.at(l, n)];
        if (!mean) to[work.at(l, n)] = static_cast<A>(d[work.at(l, n)]);
      }
      if (mean) to[l] = static_cast<A>(sum / double(std::max<int64_t>(work.samples, 1)));
    }
  };
  void* data = out.mutable_data_ptr();
  wide ? conclude(static_cast<double*>(data)) : conclude(static_cast<float*>(data));
  return out;
}

}  // namespace
}  // namespace lwkd

STABLE_TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("jacobian_factors", LWKD_BOX(lwkd::jacobian_factors));
}
