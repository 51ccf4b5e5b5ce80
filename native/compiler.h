/* What GCC and Clang, MSVC and other compilers of C11 call by different names. TERSE_PLAIN asks for the C that all take. */
#ifndef TERSE_COMPILER_H
#define TERSE_COMPILER_H
#include <stdint.h>

#if defined(__GNUC__) && defined(__i386__) && !defined(__clang__)
#pragma GCC target("sse2,fpmath=sse") /* x87 keeps more bits of a float than others do */
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(_MSC_VER)
#pragma fp_contract(off)
#endif

#if defined(__GNUC__) && !defined(TERSE_PLAIN)
#define VECTORS 1 /* of 16 bytes */
#if defined(__SSE2__)
#define SSE2 1
#include <emmintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline))
#define RARE(condition) __builtin_expect(condition, 0)
#define KEEP(value) __asm__("" : "+r"(value)) /* in a register, and not a reason to branch */
#define UNROLL _Pragma("GCC unroll 4")
#define FETCH(place) __builtin_prefetch(place)
#define TAKE(next) __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)
#else
#define INLINE static inline
#define APART static
#define RARE(condition) (condition)
#define KEEP(value) ((void)(value))
#define UNROLL
#define FETCH(place) ((void)(place))
#if defined(_MSC_VER)
#include <intrin.h>
#define TAKE(next) _InterlockedExchangeAdd((volatile long *)(next), 1)
#else
#include <stdatomic.h>
#define TAKE(next) atomic_fetch_add_explicit((_Atomic int32_t *)(next), 1, memory_order_relaxed)
#endif
#endif

/* A few floats that lie apart, `at(i)` and the next, which are then multiplied and added as one. */
#ifdef VECTORS
typedef float few __attribute__((vector_size(16)));
#define TAKEN(at, i) ((few){at(i), at((i) + 1), at((i) + 2), at((i) + 3)})
#define ADDED(a) ((a[0] + a[2]) + (a[1] + a[3]))
#define NOUGHT {0}
#else
typedef float few;
#define TAKEN(at, i) at(i)
#define ADDED(a) a
#define NOUGHT 0
#endif
#define FEW ((int64_t)(sizeof(few) / sizeof(float)))

#endif
