// each_target.h, and once more for AVX-512 with dot products of bf16 pairs: in namespace
// vlpfast::v4_bf16, where VLPFAST_BF16_PAIRS is defined (product.h). VLPFAST_ON_WIDEST_FOR(is_bf16,
// call) runs `call` there if its features are bf16 and this machine can, else as VLPFAST_ON_WIDEST.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define VLPFAST_HAS_BF16_TARGET
#endif

#include "vlpfast/each_target.h"

#ifdef VLPFAST_HAS_BF16_TARGET
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define VLPFAST_NAMESPACE v4_bf16
#define VLPFAST_LANES 16
#define VLPFAST_BF16_PAIRS
#include VLPFAST_EACH_TARGET
#undef VLPFAST_BF16_PAIRS
#undef VLPFAST_NAMESPACE
#undef VLPFAST_LANES
#pragma GCC pop_options

#define VLPFAST_ON_WIDEST_FOR(is_bf16, call)                                     \
  ((is_bf16) && __builtin_cpu_supports("avx512bf16") &&                          \
           __builtin_cpu_supports("x86-64-v4")                                   \
       ? v4_bf16::call                                                           \
       : VLPFAST_ON_WIDEST(call))
#else
#define VLPFAST_ON_WIDEST_FOR(is_bf16, call) VLPFAST_ON_WIDEST(call)
#endif
