// CPU kernels of the attention kind: all layers of a call in two parallel passes, first the maps
// (every activation read once), then the distances. lwkd/ops/attention.py states the formulas.
#include <memory>
#include <vector>

#include "attention_distance.h"
#include "attention_map.h"
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

// --- between the two passes: pooling and masks --------------------------------------------------

bool same_space(const Operand& o, const int64_t* space) {
  return o.size[0] == space[0] && o.size[1] == space[1] && o.size[2] == space[2];
}

// Adaptive average pooling of one sample's map.
template <typename A>
void pool(const A* raw, const int64_t* in, A* out, const int64_t* space) {
  for (int64_t i = 0, at = 0; i < space[0]; ++i)
    for (int64_t j = 0; j < space[1]; ++j)
      for (int64_t k = 0; k < space[2]; ++k, ++at) {
        const int64_t i0 = cell_begin(i, in[0], space[0]), i1 = cell_end(i, in[0], space[0]);
        const int64_t j0 = cell_begin(j, in[1], space[1]), j1 = cell_end(j, in[1], space[1]);
        const int64_t k0 = cell_begin(k, in[2], space[2]), k1 = cell_end(k, in[2], space[2]);
        double sum = 0;
        for (int64_t a = i0; a < i1; ++a)
          for (int64_t b = j0; b < j1; ++b)
            for (int64_t c = k0; c < k1; ++c) sum += raw[(a * in[1] + b) * in[2] + c];
        out[at] = static_cast<A>(sum / double((i1 - i0) * (j1 - j0) * (k1 - k0)));
      }
}

// Its transpose: raw position r gets the share of every cell that contains it.
template <typename A>
void unpool(const A* cells, const int64_t* space, A* raw, const int64_t* in) {
  for (int64_t q = 0; q < in[0] * in[1] * in[2]; ++q) raw[q] = 0;
  for (int64_t i = 0, at = 0; i < space[0]; ++i)
    for (int64_t j = 0; j < space[1]; ++j)
      for (int64_t k = 0; k < space[2]; ++k, ++at) {
        const int64_t i0 = cell_begin(i, in[0], space[0]), i1 = cell_end(i, in[0], space[0]);
        const int64_t j0 = cell_begin(j, in[1], space[1]), j1 = cell_end(j, in[1], space[1]);
        const int64_t k0 = cell_begin(k, in[2], space[2]), k1 = cell_end(k, in[2], space[2]);
        const A share = cells[at] / static_cast<A>((i1 - i0) * (j1 - j0) * (k1 - k0));
        for (int64_t a = i0; a < i1; ++a)
          for (int64_t b = j0; b < j1; ++b)
            for (int64_t c = k0; c < k1; ++c) raw[(a * in[1] + b) * in[2] + c] += share;
      }
}

// One layer's mask: bool [N, *space] of any strides, or none.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t stride_n = 0, size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};

  Mask() = default;
  explicit Mask(const Tensor& mask) {
    const int64_t dim = mask.dim();
    if (dim < 2) return;  // a one-dimensional tensor stands for none
    data = static_cast<const uint8_t*>(mask.const_data_ptr());
    stride_n = mask.stride(0);
    for (int64_t d = dim - 1, at = 2; d > 0; --d, --at)
      size[at] = mask.size(d), stride[at] = mask.stride(d);
  }

  // One byte a position of sample n into `keep`; how many are left in `kept`.
  const uint8_t* read(int64_t n, std::vector<uint8_t>& keep, int64_t cells, int64_t& kept) const {
    kept = cells;
    if (data == nullptr) return nullptr;
    keep.resize(cells);
    kept = 0;
    for (int64_t i = 0, at = 0; i < size[0]; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        for (int64_t k = 0; k < size[2]; ++k, ++at) {
          keep[at] = data[n * stride_n + i * stride[0] + j * stride[1] + k * stride[2]];
          kept += keep[at];
        }
    return keep.data();
  }
};

std::vector<Mask> read_masks(const std::vector<Tensor>& mask, size_t layers) {
  std::vector<Mask> out;
  for (size_t l = 0; l < layers; ++l) out.push_back(mask.empty() ? Mask() : Mask(mask[l]));
  return out;
}

// --- forward ------------------------------------------------------------------------------------

// Where one operand's raw map goes: straight into the result, or aside to be pooled.
template <typename A>
struct MapJob {
  Source operand;
  MapKernel kernel;
  A* raw;     // [N, positions]
  A* pooled;  // [N, cells]; the same as raw where nothing is pooled
};

template <typename A>
void run_maps(const std::vector<MapJob<A>>& jobs, double p) {
  std::vector<Block> blocks;
  for (const auto& job : jobs)
    blocks.push_back(make_block(job.operand.n, job.operand.c, job.operand.positions()));
  const int64_t total = lay_out(blocks);
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    run_tasks(blocks, begin, end, [&](int64_t job, int64_t n, int64_t from, int64_t to) {
      const MapJob<A>& j = jobs[job];
      j.kernel(j.operand, n, from, to, j.raw + n * j.operand.positions(), p);
    });
  });
}

template <typename A>
void forward(const std::vector<Layer>& layers, const std::vector<Mask>& masks, A* maps,
             A* distances, double p, bool js, double beta, bool mean) {
  const int64_t samples = layers[0].side[0].n;
  const bool wide = sizeof(A) == 8;
  int64_t aside = 0;
  for (const Layer& layer : layers)
    for (const Operand& o : layer.side)
      if (!same_space(o, layer.space)) aside += samples * o.positions();
  std::unique_ptr<A[]> scratch(new A[aside]);
  std::vector<MapJob<A>> jobs;
  std::vector<Block> blocks;
  A* at = scratch.get();
  for (const Layer& layer : layers) {
    for (int side = 0; side < 2; ++side) {
      const Operand& o = layer.side[side];
      A* pooled = maps + layer.maps_offset + side * samples * layer.cells;
      A* raw = pooled;
      if (!same_space(o, layer.space)) raw = at, at += samples * o.positions();
      jobs.push_back({Source(o), choose_map(o.dtype, wide, p), raw, pooled});
    }
    blocks.push_back(make_block(samples, js ? 64 : 8, layer.cells));
    blocks.back().tiles = 1;  // a sample's distance is one task, however large its map
  }
  run_maps(jobs, p);

  std::vector<double> each(layers.size() * samples);
  torch::stable::parallel_for(0, lay_out(blocks), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> keep_buffer;
    run_tasks(blocks, begin, end, [&](int64_t l, int64_t n, int64_t, int64_t) {
      const Layer& layer = layers[l];
      int64_t kept = 0;
      const uint8_t* keep = masks[l].read(n, keep_buffer, layer.cells, kept);
      A* m[2];
      for (int side = 0; side < 2; ++side) {
        const MapJob<A>& job = jobs[2 * l + side];
        m[side] = job.pooled + n * layer.cells;
        if (job.raw != job.pooled)
          pool(job.raw + n * job.operand.positions(), job.operand.size, m[side], layer.space);
        for (int64_t q = 0; keep != nullptr && q < layer.cells; ++q)
          if (keep[q] == 0) m[side][q] = 0;
      }
      each[l * samples + n] = distance(m[0], m[1], layer.cells, keep, kept, js, beta);
    });
  });
  for (size_t l = 0; l < layers.size(); ++l) {
    double sum = 0;
    for (int64_t n = 0; n < samples; ++n) {
      sum += each[l * samples + n];
      if (!mean) distances[l * samples + n] = static_cast<A>(each[l * samples + n]);
    }
    if (mean) distances[l] = static_cast<A>(sum / double(std::max<int64_t>(samples, 1)));
  }
}

// `like` gives the device; every output of this file is made here.
Tensor make(const Tensor& like, std::vector<int64_t> size, bool wide) {
  return torch::stable::new_empty(like, size, wide ? ScalarType::Double : ScalarType::Float);
}

bool any_double(const std::vector<Tensor>& xs) {
  for (const Tensor& x : xs)
    if (x.scalar_type() == ScalarType::Double) return true;
  return false;
}

std::tuple<Tensor, Tensor> attention(std::vector<Tensor> student, std::vector<Tensor> teacher,
                                     std::vector<Tensor> mask, std::vector<int64_t> student_layout,
                                     std::vector<int64_t> teacher_layout, double p,
                                     int64_t divergence, double beta, bool mean) {
  const auto layers = read_layers(student, teacher, student_layout, teacher_layout);
  const int64_t samples = layers[0].side[0].n, count = layers.size();
  const bool wide = any_double(student) || any_double(teacher);
  int64_t cells = 0;
  for (const Layer& layer : layers) cells += layer.cells;
  Tensor maps = make(student[0], {2 * samples * cells}, wide);
  std::vector<int64_t> shape{count};
  if (!mean) shape.push_back(samples);
  Tensor distances = make(student[0], shape, wide);
  const auto masks = read_masks(mask, layers.size());
  if (wide)
    forward(layers, masks, static_cast<double*>(maps.mutable_data_ptr()),
            static_cast<double*>(distances.mutable_data_ptr()), p, divergence == 1, beta, mean);
  else
    forward(layers, masks, static_cast<float*>(maps.mutable_data_ptr()),
            static_cast<float*>(distances.mutable_data_ptr()), p, divergence == 1, beta, mean);
  return {distances, maps};
}

std::vector<Tensor> attention_maps(std::vector<Tensor> xs, std::vector<int64_t> channel_dims,
                                   double p) {
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

// One activation whose gradient is wanted.
struct GradientJob {
  Source x, dx;
  int64_t layer, side;
  int64_t maps_offset, cells;  // of its layer
  const int64_t* space;
  SpreadKernel kernel;
};

// Reads grad, [L] (of the mean) or [L, N], of any strides.
template <typename A>
double grad_at(const Tensor& grad, int64_t layer, int64_t n, int64_t samples) {
  const A* g = static_cast<const A*>(grad.const_data_ptr()) + layer * grad.stride(0);
  return grad.dim() == 1 ? double(*g) / double(samples) : double(g[n * grad.stride(1)]);
}

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

template <typename A>
void backward(const Tensor& grad, const std::vector<GradientJob>& jobs,
              const std::vector<Mask>& masks, const A* maps, double p, bool js, double beta) {
  std::vector<Block> samples, tiles;
  std::vector<A*> coefficients;
  int64_t total = 0;
  for (const GradientJob& job : jobs) total += job.x.n * job.x.positions();
  std::unique_ptr<A[]> buffer(new A[total]);
  A* at = buffer.get();
  for (const GradientJob& job : jobs) {
    samples.push_back(make_block(job.x.n, js ? 64 : 8, job.x.positions()));
    samples.back().tiles = 1;
    tiles.push_back(make_block(job.x.n, 2 * job.x.c, job.x.positions()));
    coefficients.push_back(at);
    at += job.x.n * job.x.positions();
  }
  torch::stable::parallel_for(0, lay_out(samples), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> keep_buffer;
    std::vector<A> cells;
    run_tasks(samples, begin, end, [&](int64_t i, int64_t n, int64_t, int64_t) {
      const GradientJob& job = jobs[i];
      int64_t kept = 0;
      const uint8_t* keep = masks[job.layer].read(n, keep_buffer, job.cells, kept);
      const A* own = maps + job.maps_offset + (job.side * job.x.n + n) * job.cells;
      const A* other = maps + job.maps_offset + ((1 - job.side) * job.x.n + n) * job.cells;
      A* raw = coefficients[i] + n * job.x.positions();
      const bool pooled = !same_space(job.x, job.space);
      if (pooled) cells.resize(job.cells);
      A* out = pooled ? cells.data() : raw;
      const double factor = p * grad_at<A>(grad, job.layer, n, job.x.n);
      map_gradient(out, own, other, job.cells, keep, kept, js, job.side == 0 ? beta : 1 - beta,
                   factor);
      if (pooled) unpool(out, job.space, raw, job.x.size);
    });
  });
  torch::stable::parallel_for(0, lay_out(tiles), kGrain, [&](int64_t begin, int64_t end) {
    run_tasks(tiles, begin, end, [&](int64_t i, int64_t n, int64_t from, int64_t to) {
      const GradientJob& job = jobs[i];
      const A* coefficient = coefficients[i] + n * job.x.positions();
      job.kernel(job.x, job.dx, n, from, to, coefficient, p);
      if (masks[job.layer].data != nullptr) clear_uncounted(job.dx, coefficient, n, from, to);
    });
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
  const int64_t count = space.size() / 3, samples = xs[0].size(0);
  const bool wide = maps.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(grad.scalar_type() == maps.scalar_type(),
                  "lwkd: attention_backward: grad must have the dtype of maps");
  std::vector<int64_t> cells(count), offsets(count);
  for (int64_t l = 0, offset = 0; l < count; ++l) {
    cells[l] = space[3 * l] * space[3 * l + 1] * space[3 * l + 2];
    offsets[l] = offset;
    offset += 2 * samples * cells[l];
  }
  std::vector<Tensor> out;
  std::vector<GradientJob> jobs;
  for (size_t i = 0; i < xs.size(); ++i) {
    out.push_back(torch::stable::empty_like(xs[i]));
    const int64_t l = layers[i];
    const Source x(read_operand(xs[i], &layout[4 * i], "xs", i));
    const Source dx(read_operand(out[i], &layout[4 * i], "gradient", i));
    jobs.push_back(
        {x, dx, l, sides[i], offsets[l], cells[l], &space[3 * l], choose_spread(x.dtype, wide, p)});
    clear_prefix(dx, element_size(dx.dtype));
  }
  const auto masks = read_masks(mask, count);
  if (wide)
    backward(grad, jobs, masks, static_cast<const double*>(maps.const_data_ptr()), p,
             divergence == 1, beta);
  else
    backward(grad, jobs, masks, static_cast<const float*>(maps.const_data_ptr()), p,
             divergence == 1, beta);
  return out;
}

}  // namespace
}  // namespace lwkd

STABLE_TORCH_LIBRARY_IMPL(lwkd, CPU, m) {
  m.impl("attention", LWKD_BOX(lwkd::attention));
  m.impl("attention_backward", LWKD_BOX(lwkd::attention_backward));
  m.impl("attention_maps", LWKD_BOX(lwkd::attention_maps));
}
