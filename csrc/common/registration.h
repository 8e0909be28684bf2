// What an op's registration.cpp needs. It is compiled into each library: KERNELS_NAMESPACE names the
// library's ops and KERNELS_KEY the dispatch key they serve (vicreg_kernels_cpu and CPU,
// vicreg_kernels_cuda and CUDA, and for the emulator's test build vicreg_kernels_emulator and CPU).
#pragma once

#include <torch/csrc/stable/library.h>

#include <utility>

// A level of indirection, so that the macros are expanded before they are pasted. Fragments: every
// op adds its own to the library's.
#define KERNELS_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define KERNELS_FRAGMENT_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define KERNELS_LIBRARY(m) KERNELS_FRAGMENT(KERNELS_NAMESPACE, m)
#define KERNELS_IMPLEMENTATION(m) KERNELS_FRAGMENT_IMPL(KERNELS_NAMESPACE, KERNELS_KEY, m)

// An op's kernel behind the check of its arguments, which takes them all as the kernel does.
namespace common {

template <auto Check, auto Run, typename Type = decltype(Run)>
struct Checked;

template <auto Check, auto Run, typename Result, typename... Arguments>
struct Checked<Check, Run, Result (*)(Arguments...)> {
  static Result call(Arguments... arguments) {
    Check(arguments...);
    return Run(std::move(arguments)...);
  }
};

}  // namespace common

// op::run behind op::check_run.
#define KERNELS_CHECKED(op, run) TORCH_BOX((&common::Checked<&op::check_##run, &op::run>::call))
