// One portable binary with wide vectors: a function marked VLPFAST_CLONES is compiled for the
// baseline, AVX2 (v3) and AVX-512 (v4), and the loader picks. What it calls must be inlined into it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define VLPFAST_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define VLPFAST_CLONES
#endif

#define VLPFAST_INLINE inline __attribute__((always_inline))
