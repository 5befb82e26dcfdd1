// The pybind11 module lwkd._C: what was built, what this CPU runs, how the work is split.
// The CPU kernels register themselves with the dispatcher when the library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

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
}
