/* context.c once more, compiled for AVX2 (see CMakeLists.txt). */
#include "context.c"
