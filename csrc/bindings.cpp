// Opens the namespace of a native library and reports its build. It is compiled once for each
// library; an op adds itself with STABLE_TORCH_LIBRARY_FRAGMENT in csrc/<op>/bindings.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace {

// CUDA's version and architectures; empty if CUDA was not built.
std::string cuda_built() { return NEMOCASCADE_CUDA_SUMMARY; }

// The reason why CUDA was not built; empty if it was.
std::string cuda_unavailable_reason() { return NEMOCASCADE_CUDA_UNAVAILABLE_REASON; }

}  // namespace

// torch's macros paste their namespace argument, so it must be expanded first.
#define DEFINE_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define IMPLEMENT_LIBRARY(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

DEFINE_LIBRARY(NEMOCASCADE_NAMESPACE, m) {
  m.def("cuda_built() -> str");
  m.def("cuda_unavailable_reason() -> str");
}

IMPLEMENT_LIBRARY(NEMOCASCADE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_built", TORCH_BOX(&cuda_built));
  m.impl("cuda_unavailable_reason", TORCH_BOX(&cuda_unavailable_reason));
}
