// For what must be part of whoever calls it to be fast, in so many places that compilers would leave some of it out.
#pragma once

#if defined(__CUDACC__)
#define FASTSPARSE_INLINE __host__ __device__ __forceinline__
#elif defined(__SANITIZE_ADDRESS__)
// Speed is not what is looked for then, and with every check in it a file would take minutes to compile.
#define FASTSPARSE_INLINE inline
#else
#define FASTSPARSE_INLINE inline __attribute__((always_inline))
#endif
