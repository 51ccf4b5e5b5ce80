/* For devices (examples/c): a context-coded stream whose integers are taken as they are decoded, a few rows at a time, so
 * that nobody holds the array. Not for Python, hence not in terse.h. */
#ifndef TERSE_ROWS_H
#define TERSE_ROWS_H
#include "terse.h"

/* The next `count` integers are sign * level + origin; levels may lie outside of what the stream promised, which is an error
 * in the end. */
typedef void terse_take(void *to, const int32_t *levels, int64_t count, int32_t sign, int64_t origin);

/* terse_context_decode for one array (`out` and `done` do not count): how many integers it has, or an error. */
int64_t terse_context_rows(const uint8_t *in, const terse_array *array, const float *prior, terse_take *take, void *to,
                           void *room, int64_t capacity);
#endif
