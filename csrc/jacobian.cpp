// CPU kernels of the Jacobian kind: rows, all layers of a call at once, every row read once on the
// way forward and once on the way back. lwkd/ops/jacobian.py states the formulas.
#include "jacobian.h"

#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "pieces.h"

namespace lwkd {
namespace {

using Sums = std::array<double, 3>;  // Σs², Σt², Σst; of kDifference Σ(s − t)², 0, 0

// --- forward ------------------------------------------------------------------------------------

// One pass over the rows of a pair, or (kNorms) of one operand.
struct SumJob {
  RowWalk walk;
  Sums* sums;  // [N]
  int first;   // where its sums go in each
  int64_t at;  // of its first partial sums
};

template <typename A>
void sum_rows(std::vector<SumJob>& jobs, How how) {
  std::vector<Block> blocks;
  int64_t tasks = 0;
  for (SumJob& job : jobs) {
    blocks.push_back(make_block(job.walk.n, job.walk.streams.size(), job.walk.length));
    job.at = tasks;
    tasks += blocks.back().tasks();
  }
  const std::unique_ptr<Sums[]> partial(new Sums[tasks]());
  const auto kernel =
      how == kDifference ? static_cast<void (*)(const A*, const A*, int64_t, double*)>(difference)
      : how == kNorms    ? static_cast<void (*)(const A*, const A*, int64_t, double*)>(squares)
                         : static_cast<void (*)(const A*, const A*, int64_t, double*)>(products);
  parallel_tasks(blocks, [&](int64_t i, int64_t n, int64_t begin, int64_t end) {
    const SumJob& job = jobs[i];
    alignas(64) A buffer[2][kTile];
    const A* s = fetch(job.walk, 0, n, begin, end, buffer[0]);
    const A* t = job.walk.streams.size() > 1 ? fetch(job.walk, 1, n, begin, end, buffer[1]) : s;
    kernel(s, t, end - begin, partial[job.at + n * blocks[i].tiles + begin / kTile].data());
  });
  for (size_t i = 0; i < jobs.size(); ++i)
    for (int64_t n = 0; n < jobs[i].walk.n; ++n)
      for (int64_t tile = 0; tile < blocks[i].tiles; ++tile)
        for (int k = 0; jobs[i].first + k < 3; ++k)
          jobs[i].sums[n][jobs[i].first + k] += partial[jobs[i].at + n * blocks[i].tiles + tile][k];
}

double distance_of(const Sums& sums, How how) {
  if (how == kDifference) return sums[0];
  const double ss = sums[0], tt = sums[1], st = sums[2];
  const double ns = std::sqrt(ss), nt = std::sqrt(tt);
  if (how == kNorms) {
    const double ratio = ns + nt == 0 ? 0 : (ns - nt) / (ns + nt);
    return ratio * ratio;
  }
  // √(x·x) is x: equal rows are at a distance of exactly 0.
  if (ns >= kEps && nt >= kEps) {
    const double d = 2 - 2 * (st / std::sqrt(ss * tt));
    return d < 0 ? 0 : d;
  }
  const double a = ns < kEps ? kEps : ns, b = nt < kEps ? kEps : nt;
  const double d = ss / (a * a) + tt / (b * b) - 2 * (st / (a * b));
  return d < 0 ? 0 : d;
}

// dD/d(own row) = own · row + other · other row.
struct Slope {
  double own = 0, other = 0;
};

Slope slope_of(const Sums& sums, int side, How how) {
  if (how == kDifference) return {2, -2};
  const double ss = sums[side], tt = sums[1 - side], st = sums[2];
  const double ns = std::sqrt(ss), nt = std::sqrt(tt);
  if (how == kNorms) {
    const double whole = ns + nt;
    return ns < kEps ? Slope{} : Slope{4 * (ns - nt) * nt / (whole * whole * whole) / ns, 0};
  }
  if (ns < kEps || nt < kEps) return {};
  const double scale = std::sqrt(ss * tt);
  return {2 * (st / scale) / ss, -2 / scale};
}

std::tuple<Tensor, Tensor> jacobian_rows(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                         int64_t how_number, bool mean) {
  const How how = check_rows(student, teacher, how_number);
  const int64_t count = student.size(), samples = student[0].size(0);
  const bool wide = any_double(student) || any_double(teacher);
  Tensor sums = make(student[0], {count, samples, 3}, true);
  std::vector<int64_t> shape{count};
  if (!mean) shape.push_back(samples);
  Tensor distances = make(student[0], shape, wide);
  Sums* at = static_cast<Sums*>(sums.mutable_data_ptr());
  std::fill_n(at, count * samples, Sums{});
  std::vector<SumJob> jobs;
  for (int64_t l = 0; l < count; ++l) {
    Sums* own = at + l * samples;
    if (how == kNorms) {
      jobs.push_back({RowWalk({&student[l]}), own, 0, 0});
      jobs.push_back({RowWalk({&teacher[l]}), own, 1, 0});
    } else {
      jobs.push_back({RowWalk({&student[l], &teacher[l]}), own, 0, 0});
    }
  }
  wide ? sum_rows<double>(jobs, how) : sum_rows<float>(jobs, how);
  const auto conclude = [&](auto* out) {
    using A = std::remove_pointer_t<decltype(out)>;
    for (int64_t l = 0; l < count; ++l) {
      double sum = 0;
      for (int64_t n = 0; n < samples; ++n) {
        const double d = distance_of(at[l * samples + n], how);
        sum += d;
        if (!mean) out[l * samples + n] = static_cast<A>(d);
      }
      if (mean) out[l] = static_cast<A>(sum / double(std::max<int64_t>(samples, 1)));
    }
  };
  void* out = distances.mutable_data_ptr();
  wide ? conclude(static_cast<double*>(out)) : conclude(static_cast<float*>(out));
  return {distances, sums};
}

// --- backward -----------------------------------------------------------------------------------

struct SlopeJob {
  RowWalk walk;  // x, dx, and the other row where it counts
  const Sums* sums;
  int64_t layer;
  int side;
};

// Gradients of so many bytes are out of the caches before anyone reads them.
constexpr int64_t kPastCaches = 32 << 20;

template <typename A>
void spread_rows(const std::vector<SlopeJob>& jobs, const Tensor& grad, How how) {
  std::vector<Block> blocks;
  int64_t bytes = 0;
  for (const SlopeJob& job : jobs) bytes += job.walk.n * job.walk.length * sizeof(A);
  for (const SlopeJob& job : jobs)
    blocks.push_back(make_block(job.walk.n, job.walk.streams.size(), job.walk.length));
  parallel_tasks(blocks, [&](int64_t i, int64_t sample, int64_t begin, int64_t end) {
    const SlopeJob& job = jobs[i];
    const int64_t n = job.walk.n - 1 - sample;  // the way forward left the last rows in the cache
    const double g = gradient_at(grad, job.layer, n, job.walk.n);
    const Slope slope = slope_of(job.sums[n], job.side, how);
    const double own = g * slope.own, other = g * slope.other;
    alignas(64) A buffer[3][kTile];
    A* in_place = job.walk.direct<A>(1, n, begin);
    A* dx = in_place != nullptr ? in_place : buffer[1];
    if (own == 0 && other == 0) {  // whatever the rows hold
      std::fill_n(dx, end - begin, A(0));
    } else {
      const A* x = fetch(job.walk, 0, n, begin, end, buffer[0]);
      const A* y = nullptr;
      if (job.walk.streams.size() > 2) y = fetch(job.walk, 2, n, begin, end, buffer[2]);
      const bool past =
          bytes >= kPastCaches && dx == in_place && reinterpret_cast<uintptr_t>(dx) % 16 == 0;
      if (std::is_same_v<A, float> && past)
        mix_past(reinterpret_cast<float*>(dx), reinterpret_cast<const float*>(x),
                 reinterpret_cast<const float*>(y), end - begin, own, other);
      else
        mix(dx, x, y, end - begin, own, other);
    }
    if (in_place == nullptr) leave(job.walk, 1, n, begin, end, dx);
  });
}

std::vector<Tensor> jacobian_rows_backward(Tensor grad, std::vector<Tensor> xs,
                                           std::vector<Tensor> others, Tensor sums,
                                           std::vector<int64_t> layers, std::vector<int64_t> sides,
                                           int64_t how_number) {
  const How how = check_rows_backward(grad, xs, others, sums, layers, sides, how_number);
  const int64_t samples = sums.size(1);
  std::vector<Tensor> out;
  for (const Tensor& x : xs) out.push_back(fresh_like(x));
  const Sums* at = static_cast<const Sums*>(sums.const_data_ptr());
  std::vector<SlopeJob> jobs;
  for (size_t i = 0; i < xs.size(); ++i) {
    std::vector<const Tensor*> streams{&xs[i], &out[i]};
    if (how != kNorms) streams.push_back(&others[i]);
    jobs.push_back(
        {RowWalk(streams), at + layers[i] * samples, layers[i], static_cast<int>(sides[i])});
  }
  any_double(xs) || any_double(others) ? spread_rows<double>(jobs, grad, how)
                                       : spread_rows<float>(jobs, grad, how);
  return out;
}

}  // namespace
}  // namespace lwkd

STABLE_TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("jacobian_rows", LWKD_BOX(lwkd::jacobian_rows));
  m.impl("jacobian_rows_backward", LWKD_BOX(lwkd::jacobian_rows_backward));
}
