#include "compiler.h"
#include "terse.h"

/* Removing weight p moves the others by -w_p / [A^-1]_pp of A^-1's row p and takes row and column p out of A^-1. Only rows
 * and columns of weights that are still there are kept up. */

int64_t terse_surgeon(double *w, double *inverse, int64_t n, int64_t count, int32_t *order, double *costs) {
    if (n < 1 || n > INT32_MAX || count < 0 || count > n) return TERSE_EARGUMENT;
    for (int64_t k = 0; k < count; k++) {
        int64_t p = -1;
        double least = 0;
        for (int64_t i = 0; i < n; i++) {
            double own = inverse[i * n + i];
            if (own <= 0) continue; /* gone */
            double score = w[i] * w[i] / own;
            if (p < 0 || score < least) p = i, least = score;
        }
        if (p < 0) return TERSE_EDATA;
        order[k] = (int32_t)p;
        costs[k] = least;
        double *row = inverse + p * n, own = row[p], taken = w[p];
        for (int64_t i = 0; i < n; i++) {
            double *other = inverse + i * n, by = row[i];
            if (i == p || other[i] <= 0) continue;
            w[i] -= taken * (by / own);
            for (int64_t j = 0; j < n; j++) other[j] -= by * (row[j] / own);
        }
        row[p] = 0;
    }
    return count;
}
