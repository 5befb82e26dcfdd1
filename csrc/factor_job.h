// One parameter of a layer as the factors' kernel sees it: how it is contracted, cut into tiles,
// and what a tile costs.
#pragma once

#include <cmath>
#include <optional>

#include "factors.h"
#include "jacobian.h"

namespace lwkd {
namespace {

constexpr int64_t kRows = 256;         // rows of a block of a gram
constexpr int64_t kColumns = 512;      // of what is multiplied at a time
constexpr int64_t kSteps = 512;        // rows that go into a gradient at a time
constexpr int64_t kNumbers = 1 << 17;  // of a tile of a gradient
constexpr int64_t kPlane = 1 << 19;    // of a convolution's channels taken at a time

// `total` in parts of one size, none above `limit`, but the last.
struct Split {
  Split(int64_t total_, int64_t limit)
      : total(total_),
        count(std::max<int64_t>(1, (total + limit - 1) / limit)),
        size((total + count - 1) / count) {}

  int64_t begin(int64_t i) const { return std::min(i * size, total); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }

  int64_t total, count, size;
};

// Both gradients are off by some 3e-8·√T of themselves, number by number: from so far apart on, as
// a share of their norm, that is within the digits that are promised of their difference.
inline double far_enough(const Item& item) {
  const double numbers = double(item.inputs) * item.outputs * item.groups;
  return std::max(3e-3, 0.12 * std::sqrt(item.rows / std::max(numbers, 1.0)));
}

// One parameter of a layer; of kNorms that of one network alone.
struct Job {
  Item student, teacher;
  int64_t layer = 0;
  bool gram = false;
  int slot = 0;                           // where its sums go
  std::optional<RowWalk> walk_a, walk_d;  // both networks' numbers

  bool indices() const { return student.form == kIndices; }
  // Whether G is built, tile by tile, of which there are more and less exact ways.
  bool builds() const { return !gram && !indices() && !student.thin(); }

  // Whether the library is called: its products are to be one thread's, and a region makes them so.
  bool library() const {
    if (!gram && !builds()) return false;
    if (student.form == kConvolution && !gram) return true;
    const int64_t r = row_blocks().size;
    const int64_t most = gram ? r * r * std::max(student.inputs, student.outputs)
                              : student.rows * student.inputs * student.outputs;
    return most > kSmall;
  }

  Split row_blocks() const { return {student.rows, kRows}; }
  Split input_blocks() const { return {student.inputs, kLine}; }
  Split output_blocks() const {
    const int64_t fit = kNumbers / std::max<int64_t>(input_blocks().size, 1);
    return {student.outputs, std::clamp<int64_t>(fit, 16, kLine)};
  }
  // Of a convolution: of groups where there are several, else of the channels of y and of x.
  Split group_blocks() const {
    if (student.groups == 1) return {1, 1};
    const int64_t weight = student.inputs * student.outputs;
    const int64_t x = student.x->size(1) / student.groups * x_plane();
    const int64_t plane = std::max(x, student.outputs * student.rows);
    const int64_t fit = std::min(2 * kNumbers / std::max<int64_t>(weight, 1), kPlane / plane);
    return {student.groups, std::max<int64_t>(1, fit)};
  }
  Split y_blocks() const {
    if (student.groups > 1) return {1, 1};
    const int64_t by_weight = 2 * kNumbers / std::max<int64_t>(student.inputs, 1);
    const int64_t by_plane = kPlane / std::max<int64_t>(student.rows, 1);
    return {student.outputs, std::max<int64_t>(16, std::min(by_weight, by_plane))};
  }
  Split x_blocks() const {
    if (student.groups > 1) return {1, 1};
    return {student.x->size(1), std::max<int64_t>(1, kPlane / x_plane())};
  }
  int64_t x_plane() const {
    int64_t count = 1;
    for (const int64_t s : student.space) count *= s;
    return std::max<int64_t>(count, 1);
  }

  int64_t tiles() const {
    if (indices() || student.thin()) return 1;
    if (gram) return student.groups * row_blocks().count * (row_blocks().count + 1) / 2;
    if (student.form == kDense)
      return student.groups * output_blocks().count * input_blocks().count;
    return group_blocks().count * y_blocks().count * x_blocks().count;
  }
  // About how many numbers' time a task takes: the library does a hundred multiplications in that.
  int64_t cost(How how) const {
    const Item& s = student;
    const int64_t ways = how == kNorms ? 1 : how == kNormalized ? 3 : 2;
    int64_t all = 0;
    if (indices() || s.thin())
      all = 2 * s.groups * s.rows * (s.inputs + s.outputs);
    else if (gram)
      all = s.groups * s.rows * (s.inputs + s.outputs) * (3 * s.rows / 100 + 4);
    else
      all = s.groups * s.rows * s.inputs * s.outputs / 100 * ways + s.rows * s.outputs * ways;
    return all / tiles() + 1024;
  }
  // Numbers that a thread keeps.
  int64_t scratch() const {
    if (indices()) return 4 * student.outputs + 2 * student.rows * student.outputs;
    if (student.thin()) return 4 * std::max(student.inputs, student.outputs);
    if (gram) {
      const int64_t r = row_blocks().size, blocks = row_blocks().count > 1 ? 4 : 2;
      return blocks * r * std::min(std::max(student.inputs, student.outputs), kColumns) + 8 * r * r;
    }
    if (student.form == kDense) {
      const int64_t i = input_blocks().size, o = output_blocks().size;
      return 2 * std::min(student.rows, kSteps) * (i + o) + 4 * i * o;
    }
    const int64_t weight = 3 * y_blocks().size * group_blocks().size * student.inputs;
    return weight + 3 * (x_blocks().size * x_plane() + y_blocks().size * student.rows);
  }
};

// What a task is asked for.
struct Ask {
  int64_t n = 0, tile = 0;
  How how = kDifference;
  bool stacked = true;
  double c = 1, c_a = 1;

  double c_d() const { return c / c_a; }
};

}  // namespace
}  // namespace lwkd
