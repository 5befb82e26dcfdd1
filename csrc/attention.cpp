// CPU kernels of the attention kind: all layers of a call at once, every activation read once on
// the way forward and once on the way back. lwkd/ops/attention.py states the formulas.
#include <memory>
#include <vector>

#include "attention_distance.h"
#include "attention_map.h"
#include "attention_pool.h"
#include "schedule.h"

namespace lwkd {
namespace {

// map[begin, end) of sample n.
template <typename T, typename A, typename P>
LWKD_INLINE void map_task(const Source& o, int64_t n, int64_t begin, int64_t end, A* map, P p) {
  const T* sample = static_cast<const T*>(o.data) + n * o.stride_n;
  o.runs.cover(begin, end, [&](int64_t offset, int64_t at, int64_t count) LWKD_LAMBDA {
    sum_run(o.order, map + at, sample + offset, o.stride_c, o.runs.stride, o.c, count, p);
  });
}

// dx over [begin, end) of sample n. Both tensors are walked in runs that neither breaks.
template <typename T, typename A, typename P>
LWKD_INLINE void spread_task(const Source& x, const Source& dx, int64_t n, int64_t begin,
                             int64_t end, const A* coefficient, P p) {
  const Order order = x.order == dx.order ? x.order : Order::kStrided;
  const T* source = static_cast<const T*>(x.data) + n * x.stride_n;
  T* target = static_cast<T*>(dx.data) + n * dx.stride_n;
  const Runs &from = x.runs, &to = dx.runs;
  to.cover(begin, end, [&](int64_t to_offset, int64_t first, int64_t length) LWKD_LAMBDA {
    from.cover(first, first + length, [&](int64_t offset, int64_t at, int64_t count) LWKD_LAMBDA {
      spread_run(order, target + to_offset + (at - first) * to.stride, source + offset,
                 coefficient + at, dx.stride_c, to.stride, x.stride_c, from.stride, x.c, count, p);
    });
  });
}

// --- one ordinary function per storage type, compute type and power: clones need that ------------

using MapKernel = void (*)(const Source&, int64_t n, int64_t begin, int64_t end, void* map,
                           double p);
using SpreadKernel = void (*)(const Source& x, const Source& dx, int64_t n, int64_t begin,
                              int64_t end, const void* coefficient, double p);

#define LWKD_KERNEL(clones, name, T, A, P)                                                        \
  clones void map_##name##_##P(const Source& o, int64_t n, int64_t begin, int64_t end, void* map, \
                               double p) {                                                        \
    map_task<T, A>(o, n, begin, end, static_cast<A*>(map), P(p));                                 \
  }                                                                                               \
  clones void spread_##name##_##P(const Source& x, const Source& dx, int64_t n, int64_t begin,    \
                                  int64_t end, const void* coefficient, double p) {               \
    spread_task<T, A>(x, dx, n, begin, end, static_cast<const A*>(coefficient), P(p));            \
  }
#define LWKD_POWERS(clones, name, T, A) \
  LWKD_KERNEL(clones, name, T, A, One)  \
  LWKD_KERNEL(clones, name, T, A, Two)  \
  LWKD_KERNEL(clones, name, T, A, Any)
#define LWKD_PLAIN

LWKD_POWERS(LWKD_CLONES, float, float, float)
LWKD_POWERS(LWKD_CLONES, half, Half, float)
LWKD_POWERS(LWKD_CLONES, bfloat16, BFloat16, float)
LWKD_POWERS(LWKD_CLONES, double, double, double)
// A narrow operand in a call that computes in double: rare, so not cloned.
LWKD_POWERS(LWKD_PLAIN, float_wide, float, double)
LWKD_POWERS(LWKD_PLAIN, half_wide, Half, double)
LWKD_POWERS(LWKD_PLAIN, bfloat16_wide, BFloat16, double)

#define LWKD_CHOOSE(kernel, name) \
  return p == 2 ? kernel##_##name##_Two : p == 1 ? kernel##_##name##_One : kernel##_##name##_Any
#define LWKD_CHOOSER(Type, kernel)                                     \
  Type choose_##kernel(ScalarType dtype, bool wide, double p) {        \
    if (dtype == ScalarType::Double) LWKD_CHOOSE(kernel, double);      \
    if (wide) {                                                        \
      if (dtype == ScalarType::Float) LWKD_CHOOSE(kernel, float_wide); \
      if (dtype == ScalarType::Half) LWKD_CHOOSE(kernel, half_wide);   \
      LWKD_CHOOSE(kernel, bfloat16_wide);                              \
    }                                                                  \
    if (dtype == ScalarType::Float) LWKD_CHOOSE(kernel, float);        \
    if (dtype == ScalarType::Half) LWKD_CHOOSE(kernel, half);          \
    LWKD_CHOOSE(kernel, bfloat16);                                     \
  }
LWKD_CHOOSER(MapKernel, map)
LWKD_CHOOSER(SpreadKernel, spread)

// The distance of one sample (or the gradient of one of its maps), in either compute type.
#define LWKD_DISTANCES(A, name)                                                             \
  LWKD_CLONES double l2_##name(const A* s, const A* t, int64_t cells) {                     \
    return distance_l2(s, t, cells);                                                        \
  }                                                                                         \
  LWKD_CLONES double js_##name(const A* s, const A* t, int64_t cells, const uint8_t* keep,  \
                               int64_t kept, double beta) {                                 \
    return distance_js(s, t, cells, keep, kept, beta);                                      \
  }                                                                                         \
  LWKD_CLONES void l2_gradient_##name(A* out, const A* m, const A* other, int64_t cells,    \
                                      const uint8_t* keep, double grad) {                   \
    gradient_l2(out, m, other, cells, keep, grad);                                          \
  }                                                                                         \
  LWKD_CLONES void js_gradient_##name(A* out, const A* m, const A* other, int64_t cells,    \
                                      const uint8_t* keep, int64_t kept, double own,        \
                                      double grad) {                                        \
    gradient_js(out, m, other, cells, keep, kept, own, grad);                               \
  }                                                                                         \
  double distance(const A* s, const A* t, int64_t cells, const uint8_t* keep, int64_t kept, \
                  bool js, double beta) {                                                   \
    return js ? js_##name(s, t, cells, keep, kept, beta) : l2_##name(s, t, cells);          \
  }                                                                                         \
  void map_gradient(A* out, const A* m, const A* other, int64_t cells, const uint8_t* keep, \
                    int64_t kept, bool js, double own, double grad) {                       \
    js ? js_gradient_##name(out, m, other, cells, keep, kept, own, grad)                    \
       : l2_gradient_##name(out, m, other, cells, keep, grad);                              \
  }
LWKD_DISTANCES(float, float)
LWKD_DISTANCES(double, double)

// --- forward ------------------------------------------------------------------------------------

// Where one operand's raw map goes: straight into the result, or aside to be pooled.
template <typename A>
struct MapJob {
  Source operand;
  MapKernel kernel;
  A* raw;     // [N, positions]
  A* pooled;  // [N, cells]; the same as raw where nothing is pooled

  void run(int64_t n, int64_t begin, int64_t end, double p) const {
    kernel(operand, n, begin, end, raw + n * operand.positions(), p);
  }
};

template <typename A>
void run_maps(const std::vector<MapJob<A>>& jobs, double p) {
  std::vector<Block> blocks;
  for (const auto& job : jobs)
    blocks.push_back(make_block(job.operand.n, job.operand.c, job.operand.positions()));
  parallel_tasks(blocks, [&](int64_t job, int64_t n, int64_t begin, int64_t end) {
    jobs[job].run(n, begin, end, p);
  });
}

struct Options {
  double p;
  bool js;
  double beta;
  bool mean;
};

// One layer's maps and distances.
template <typename A>
struct PairJob {
  MapJob<A> side[2];
  const int64_t* space;
  int64_t cells;
  const Mask* mask;
  double* distances;  // [N]

  // A sample's maps are small enough for one task to make both and compare them in cache.
  bool whole() const {
    return std::max(side[0].operand.positions(), side[1].operand.positions()) <= kTile;
  }

  void compare(int64_t n, const Options& o, std::vector<uint8_t>& buffer) const {
    int64_t kept = 0;
    const uint8_t* keep = mask->read(n, buffer, cells, kept);
    A* m[2];
    for (int s = 0; s < 2; ++s) {
      const MapJob<A>& job = side[s];
      m[s] = job.pooled + n * cells;
      if (job.raw != job.pooled)
        pool(job.raw + n * job.operand.positions(), job.operand.size, m[s], space);
      for (int64_t q = 0; keep != nullptr && q < cells; ++q)
        if (keep[q] == 0) m[s][q] = 0;
    }
    distances[n] = distance(m[0], m[1], cells, keep, kept, o.js, o.beta);
  }
};

// Small layers take one pass, in which a task does all of a sample. Large ones take two: maps,
// tile by tile, then distances.
template <typename A>
void run_pairs(const std::vector<PairJob<A>>& jobs, const Options& o) {
  struct Part {
    const PairJob<A>* job;
    int side;  // 2: all of a sample
  };
  std::vector<Part> parts;
  std::vector<Block> blocks, compared;
  std::vector<const PairJob<A>*> split;
  for (const PairJob<A>& job : jobs) {
    const Operand &s = job.side[0].operand, &t = job.side[1].operand;
    const int64_t distance_cost = (o.js ? 64 : 8) * job.cells;
    if (job.whole()) {
      parts.push_back({&job, 2});
      blocks.push_back(whole_samples(
          s.n, (s.c + 1) * s.positions() + (t.c + 1) * t.positions() + distance_cost));
      continue;
    }
    for (int side = 0; side < 2; ++side) {
      const Operand& x = job.side[side].operand;
      parts.push_back({&job, side});
      blocks.push_back(make_block(x.n, x.c, x.positions()));
    }
    split.push_back(&job);
    compared.push_back(whole_samples(s.n, distance_cost));
  }
  parallel_tasks(blocks, [&](int64_t i, int64_t n, int64_t begin, int64_t end) {
    const PairJob<A>& job = *parts[i].job;
    if (parts[i].side < 2) return job.side[parts[i].side].run(n, begin, end, o.p);
    thread_local std::vector<uint8_t> buffer;
    for (const MapJob<A>& side : job.side) side.run(n, 0, side.operand.positions(), o.p);
    job.compare(n, o, buffer);
  });
  parallel_tasks(compared, [&](int64_t i, int64_t n, int64_t, int64_t) {
    thread_local std::vector<uint8_t> buffer;
    split[i]->compare(n, o, buffer);
  });
}

template <typename A>
void forward(const std::vector<Layer>& layers, const std::vector<Mask>& masks, A* maps,
             A* distances, const Options& o) {
  const int64_t samples = layers[0].side[0].n;
  int64_t aside = 0;
  for (const Layer& layer : layers)
    for (const Operand& x : layer.side)
      if (!same_space(x, layer.space)) aside += samples * x.positions();
  const std::unique_ptr<A[]> scratch(new A[aside]);
  const std::unique_ptr<double[]> each(new double[layers.size() * samples]);
  std::vector<PairJob<A>> jobs;
  jobs.reserve(layers.size());
  A* at = scratch.get();
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& layer = layers[l];
    const auto map_job = [&](int side) {
      const Operand& x = layer.side[side];
      A* pooled = maps + layer.maps_offset + side * samples * layer.cells;
      A* raw = pooled;
      if (!same_space(x, layer.space)) raw = at, at += samples * x.positions();
      return MapJob<A>{Source(x), choose_map(x.dtype, sizeof(A) == 8, o.p), raw, pooled};
    };
    jobs.push_back(
        {{map_job(0), map_job(1)}, layer.space, layer.cells, &masks[l], each.get() + l * samples});
  }
  run_pairs(jobs, o);
  for (size_t l = 0; l < layers.size(); ++l) {
    double sum = 0;
    for (int64_t n = 0; n < samples; ++n) {
      sum += each[l * samples + n];
      if (!o.mean) distances[l * samples + n] = static_cast<A>(each[l * samples + n]);
    }
    if (o.mean) distances[l] = static_cast<A>(sum / double(std::max<int64_t>(samples, 1)));
  }
}

std::tuple<Tensor, Tensor> attention(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                     std::vector<Tensor> mask, std::vector<int64_t> student_layout,
                                     std::vector<int64_t> teacher_layout, double p,
                                     int64_t divergence, double beta, bool mean) {
  const auto layers = read_layers(student, teacher, student_layout, teacher_layout);
  for (size_t l = 0; l < layers.size(); ++l)
    check_mask(mask, l, layers[l].side[0].n, layers[l].space);
  const int64_t samples = layers[0].side[0].n, count = layers.size();
  const bool wide = any_double(student) || any_double(teacher);
  const Options options{p, divergence == 1, beta, mean};
  int64_t cells = 0;
  for (const Layer& layer : layers) cells += layer.cells;
  Tensor maps = make(student[0], {2 * samples * cells}, wide);
  std::vector<int64_t> shape{count};
  if (!mean) shape.push_back(samples);
  Tensor distances = make(student[0], shape, wide);
  const auto masks = read_masks(mask, layers.size());
  if (wide)
    forward(layers, masks, static_cast<double*>(maps.mutable_data_ptr()),
            static_cast<double*>(distances.mutable_data_ptr()), options);
  else
    forward(layers, masks, static_cast<float*>(maps.mutable_data_ptr()),
            static_cast<float*>(distances.mutable_data_ptr()), options);
  return {distances, maps};
}

std::vector<Tensor> attention_maps(std::vector<Tensor> xs, std::vector<int64_t> channel_dims,
                                   double p) {
  STD_TORCH_CHECK(xs.size() == channel_dims.size(),
                  "lwkd.ops: attention_maps: channel_dims: ", "expected one a tensor, got ",
                  channel_dims.size());
  std::vector<Tensor> out;
  std::vector<Operand> operands;
  for (size_t i = 0; i < xs.size(); ++i) {
    const int64_t layout[4] = {channel_dims[i], 0, 0, 0};
    operands.push_back(read_operand(xs[i], layout, "xs", i));
    std::vector<int64_t> size;
    for (int64_t d = 0; d < xs[i].dim(); ++d)
      if (d != channel_dims[i]) size.push_back(xs[i].size(d));
    out.push_back(make(xs[i], size, operands[i].dtype == ScalarType::Double));
  }
  std::vector<MapJob<float>> narrow;
  std::vector<MapJob<double>> wide;
  for (size_t i = 0; i < xs.size(); ++i) {
    const Operand& o = operands[i];
    void* map = out[i].mutable_data_ptr();
    if (o.dtype == ScalarType::Double)
      wide.push_back({Source(o), choose_map(o.dtype, true, p), static_cast<double*>(map), nullptr});
    else
      narrow.push_back(
          {Source(o), choose_map(o.dtype, false, p), static_cast<float*>(map), nullptr});
  }
  run_maps(narrow, p);
  run_maps(wide, p);
  return out;
}

// --- backward -----------------------------------------------------------------------------------

// A NaN that is masked out has the coefficient 0 and would still be a NaN in its gradient.
template <typename A>
void clear_uncounted(const Operand& dx, const A* coefficient, int64_t n, int64_t begin,
                     int64_t end) {
  const int64_t element = element_size(dx.dtype);
  char* sample = static_cast<char*>(dx.data) + n * dx.stride_n * element;
  for (int64_t q = begin; q < end; ++q) {
    if (coefficient[q] != 0) continue;
    const int64_t k = q % dx.size[2], j = q / dx.size[2] % dx.size[1],
                  i = q / dx.size[2] / dx.size[1];
    char* at = sample + (i * dx.stride[0] + j * dx.stride[1] + k * dx.stride[2]) * element;
    for (int64_t c = 0; c < dx.c; ++c) std::memset(at + c * dx.stride_c * element, 0, element);
  }
}

// One activation whose gradient is wanted.
template <typename A>
struct GradientJob {
  Source x, dx;
  SpreadKernel kernel;
  const A *own, *other;  // [N, cells], the map of this side and of the other
  int64_t layer, cells;
  const int64_t* space;
  double weight;  // of this side in "js"
  const Mask* mask;
  A* coefficient;  // [N, positions] where a sample is cut into tiles, else null

  bool whole() const { return x.positions() <= kTile; }

  // c[q] of dx = c[q] · |x|^(p−1) sign(x), for the positions of sample n.
  void weigh(const Tensor& grad, int64_t n, const Options& o, A* out) const {
    thread_local std::vector<uint8_t> keep_buffer;
    thread_local std::vector<A> pooled;
    int64_t kept = 0;
    const uint8_t* keep = mask->read(n, keep_buffer, cells, kept);
    const bool same = same_space(x, space);
    if (!same) pooled.resize(cells);
    A* at = same ? out : pooled.data();
    map_gradient(at, own + n * cells, other + n * cells, cells, keep, kept, o.js, weight,
                 o.p * gradient_at(grad, layer, n, x.n));
    if (!same) unpool(at, space, out, x.size);
  }

  void spread(int64_t n, int64_t begin, int64_t end, const A* c, double p) const {
    kernel(x, dx, n, begin, end, c, p);
    if (mask->data != nullptr) clear_uncounted(dx, c, n, begin, end);
  }
};

template <typename A>
void backward(const Tensor& grad, std::vector<GradientJob<A>>& jobs, const Options& o) {
  int64_t aside = 0;
  for (const auto& job : jobs) aside += job.whole() ? 0 : job.x.n * job.x.positions();
  const std::unique_ptr<A[]> scratch(new A[aside]);
  std::vector<Block> tiles, weighed;
  std::vector<const GradientJob<A>*> split;
  A* at = scratch.get();
  for (auto& job : jobs) {
    const int64_t cost = (o.js ? 64 : 8) * job.x.positions();
    if (job.whole()) {
      tiles.push_back(whole_samples(job.x.n, 2 * job.x.c * job.x.positions() + cost));
      continue;
    }
    job.coefficient = at, at += job.x.n * job.x.positions();
    tiles.push_back(make_block(job.x.n, 2 * job.x.c, job.x.positions()));
    weighed.push_back(whole_samples(job.x.n, cost));
    split.push_back(&job);
  }
  parallel_tasks(weighed, [&](int64_t i, int64_t n, int64_t, int64_t) {
    const GradientJob<A>& job = *split[i];
    job.weigh(grad, n, o, job.coefficient + n * job.x.positions());
  });
  parallel_tasks(tiles, [&](int64_t i, int64_t n, int64_t begin, int64_t end) {
    const GradientJob<A>& job = jobs[i];
    if (!job.whole())
      return job.spread(n, begin, end, job.coefficient + n * job.x.positions(), o.p);
    alignas(64) A coefficient[kTile];
    job.weigh(grad, n, o, coefficient);
    job.spread(n, 0, job.x.positions(), coefficient, o.p);
  });
}

// Dropped tokens never reached the map.
void clear_prefix(const Operand& dx, int64_t element) {
  if (dx.prefix == 0) return;
  char* data = static_cast<char*>(dx.data);
  for (int64_t n = 0; n < dx.n; ++n)
    for (int64_t t = 1; t <= dx.prefix; ++t)
      for (int64_t c = 0; c < dx.c; ++c)
        std::memset(data + (n * dx.stride_n - t * dx.stride_token + c * dx.stride_c) * element, 0,
                    element);
}

std::vector<Tensor> attention_backward(Tensor grad, std::vector<Tensor> xs,
                                       std::vector<Tensor> mask, Tensor maps,
                                       std::vector<int64_t> layers, std::vector<int64_t> sides,
                                       std::vector<int64_t> layout, std::vector<int64_t> space,
                                       double p, int64_t divergence, double beta) {
  const auto operands = read_gradient_lists(grad, xs, mask, maps, layers, sides, layout, space);
  const int64_t count = space.size() / 3, samples = xs[0].size(0);
  const bool wide = maps.scalar_type() == ScalarType::Double;
  const auto masks = read_masks(mask, count);
  const Options options{p, divergence == 1, beta, grad.dim() == 1};
  std::vector<Tensor> out;
  for (const Tensor& x : xs) out.push_back(fresh_like(x));
  const auto run = [&](auto* maps_at) {
    using A = std::remove_const_t<std::remove_pointer_t<decltype(maps_at)>>;
    std::vector<const A*> first(count);  // of each layer's maps
    std::vector<int64_t> cells(count);
    for (int64_t l = 0; l < count; ++l) {
      cells[l] = space[3 * l] * space[3 * l + 1] * space[3 * l + 2];
      first[l] = maps_at, maps_at += 2 * samples * cells[l];
    }
    std::vector<GradientJob<A>> jobs;
    jobs.reserve(xs.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      const int64_t l = layers[i], side = sides[i], map = samples * cells[l];
      const Source x(operands[i]);
      const Source dx(read_operand(out[i], &layout[4 * i], "gradient", i));
      jobs.push_back({x, dx, choose_spread(x.dtype, wide, p), first[l] + side * map,
                      first[l] + (1 - side) * map, l, cells[l], &space[3 * l],
                      side == 0 ? beta : 1 - beta, &masks[l], nullptr});
      clear_prefix(dx, element_size(dx.dtype));
    }
    backward(grad, jobs, options);
  };
  if (wide)
    run(static_cast<const double*>(maps.const_data_ptr()));
  else
    run(static_cast<const float*>(maps.const_data_ptr()));
  return out;
}

}  // namespace
}  // namespace lwkd

STABLE_TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("attention", LWKD_BOX(lwkd::attention));
  m.impl("attention_backward", LWKD_BOX(lwkd::attention_backward));
  m.impl("attention_maps", LWKD_BOX(lwkd::attention_maps));
}
