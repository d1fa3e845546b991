// Includes the file named by VLPFAST_EACH_TARGET once for every kind of CPU this binary serves, in
// the namespaces vlpfast::base, ::v3 (AVX2) and ::v4 (AVX-512). target_clones (simd.h) cannot do
// that for explicit vectors: they are split for the baseline before anything is inlined.
//
// The included file has no include guard. It sees VLPFAST_LANES, the floats in a vector register,
// and VLPFAST_NAMESPACE. Standard headers are included before, outside of any target.
// VLPFAST_ON_WIDEST(call) then runs `call` as compiled for the widest vectors of this machine.
#pragma once

#ifndef VLPFAST_EACH_TARGET
#error "define VLPFAST_EACH_TARGET"
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // nothing that takes a vector crosses a binary border

#define VLPFAST_NAMESPACE base
#define VLPFAST_LANES 4
#include VLPFAST_EACH_TARGET
#undef VLPFAST_NAMESPACE
#undef VLPFAST_LANES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define VLPFAST_NAMESPACE v3
#define VLPFAST_LANES 8
#include VLPFAST_EACH_TARGET
#undef VLPFAST_NAMESPACE
#undef VLPFAST_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define VLPFAST_NAMESPACE v4
#define VLPFAST_LANES 16
#include VLPFAST_EACH_TARGET
#undef VLPFAST_NAMESPACE
#undef VLPFAST_LANES
#pragma GCC pop_options

#define VLPFAST_ON_WIDEST(call)                    \
  (__builtin_cpu_supports("x86-64-v4")   ? v4::call \
   : __builtin_cpu_supports("x86-64-v3") ? v3::call \
                                         : base::call)
#else
#define VLPFAST_ON_WIDEST(call) base::call
#endif
