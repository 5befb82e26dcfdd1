// The pybind11 module lwkd._C: what was built, what this CPU runs, how the work is split.
// The CPU kernels register themselves with the dispatcher when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "philox.h"
#include "schedule.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"target", "torch 2.10 stable ABI"},
#include "lwkd_build_info.h"
  };
}

// The micro-architecture level whose clones of the kernels the loader chose.
std::string cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  return "x86-64";
#else
  return "portable";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "What the library was built with, as strings.");
  m.def("cpu_level", &cpu_level, "The instruction-set level that the CPU kernels run at.");
  m.def(
      "plan", &lwkd::plan, pybind11::arg("shapes"),
      "The split of layers [(N, C, positions)] into tasks (layer, sample, begin, end): a function "
      "of the shapes alone, never of the thread count.");
  m.def(
      "philox",
      [](std::array<uint32_t, 2> key, std::array<uint32_t, 4> counter) {
        const lwkd::PhiloxWords out = lwkd::philox(
            uint64_t(key[1]) << 32 | key[0], {{counter[0], counter[1], counter[2], counter[3]}});
        return std::array<uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
      },
      pybind11::arg("key"), pybind11::arg("counter"),
      "The four words of Philox4x32-10 for a key (low, high) and a counter.");
}
