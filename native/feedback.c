#include "terse.h"

/* Columns from the last to the first, and in each the rows from the last to the first: each level makes up for what the
 * levels before it have added to its own coordinate of the error. Sums run in one order, so that any machine that does
 * not fuse multiplications with additions finds the same levels. */

int64_t terse_feedback(double *whitened, const double *inputs, const double *outputs, const terse_feedback_steps *steps,
                       int32_t *levels, double *work) {
    const int64_t n = steps->columns, m = steps->rows;
    if (n < 1 || m < 1 || steps->contexts < 1) return TERSE_EARGUMENT;
    double *carried = work, *made = work + m;
    for (int64_t j = n; j-- > 0;) {
        double *column = whitened + j * m, own = inputs[j * n + j], sum = 0;
        int32_t *level = levels + j * m, context = 0;
        for (int64_t i = 0; i < m; i++) {
            double x = column[i] / (own * (steps->row[i] * steps->column[j]));
            if (!steps->kept || steps->kept[j * m + i]) sum += x < 0 ? -x : x;
            carried[i] = 0;
        }
        while (context < steps->contexts - 1 && sum >= steps->edge[context] * (double)m) context++;
        const double one = steps->one[context], more = steps->more[context];
        for (int64_t i = m; i-- > 0;) {
            double step = steps->row[i] * steps->column[j], x = (column[i] + carried[i]) / (own * step);
            double size = x < 0 ? -x : x;
            if (!(size < steps->highest)) size = steps->highest;
            int32_t k = (int32_t)(size + 0.5);
            if (k > 0 && size - (k - 0.5) < (k > 1 ? more : one)) k--; /* the bits saved are worth the error */
            if (steps->kept && !steps->kept[j * m + i]) k = 0;
            level[i] = x < 0 ? -k : k;
            made[i] = level[i] * step;
            if (outputs) {
                const double *row = outputs + i * m, left = column[i] - made[i] * own;
                for (int64_t l = 0; l < i; l++) carried[l] += row[l] * left;
            }
        }
        for (int64_t l = 0; l < j; l++) {
            double *other = whitened + l * m, by = inputs[j * n + l];
            for (int64_t i = 0; i < m; i++) other[i] -= made[i] * by;
        }
    }
    return n * m;
}
