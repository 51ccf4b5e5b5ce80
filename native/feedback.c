#include "compiler.h"
#include "terse.h"

#include <string.h>

/* Lines (rows of a weight) from the last to the first, and in each its values from the last to the first: each level makes
 * up for what the levels before it have added to its own coordinate of the error. Sums run in one order, so
 * that any machine that does not fuse multiplications with additions finds the same levels. */

#define BLOCK 32 /* a level is decided when one to two blocks behind it were searched */
#define LINES 16 /* so many lines at once are taken from those before them */
#define STRIP 128 /* of values, so that those of all these lines stay in the cache */
#define NEVER 1e300

static const uint8_t NEXT[TERSE_STATES][2] = TERSE_NEXT;

typedef struct {
    const terse_feedback_steps *steps;
    const double *factor; /* of the values of a line, blocks with a diagonal of ones, or NULL */
    const double *weight; /* of the line, whitened across the lines */
    double *carried;      /* what decided levels have added to the coordinates before them */
    const int32_t *context;
    double own, step; /* the line's diagonal in the other factor, its part of the steps */
} course;

/* For each state before a value, the level of its cheapest path and the state after it. */
typedef struct {
    int64_t first, count;
    int32_t level[BLOCK][TERSE_STATES];
    uint8_t next[BLOCK][TERSE_STATES];
} history;

/* For each state, the cost of its cheapest path to the end of the line, and targets of the block's values on that path. */
typedef struct {
    double cost[TERSE_STATES], target[TERSE_STATES][BLOCK];
} paths;

static int32_t context_of(const terse_feedback_steps *steps, double mean) {
    int32_t context = 0, step = 1;
    while (2 * step < steps->contexts) step *= 2;
    for (; step > 0; step /= 2)
        if (context + step < steps->contexts && mean >= steps->edge[context + step - 1]) context += step;
    return context;
}

static double error_of(const course *c, int64_t i, int32_t level) {
    return c->weight[i] - level * (c->steps->value[i] * c->step) * c->own;
}

/* Where the block of a factor begins in which a coordinate lies: before it its row holds nothing. */
static int64_t start_of(int64_t i, int64_t width) {
    return i / width * width;
}

/* The levels of the path that begins in a state, and the state in which it leaves the block. */
static int32_t followed(const history *h, int32_t state, int32_t *level) {
    for (int64_t k = 0; k < h->count; k++) {
        if (level) level[k] = h->level[k][state];
        state = h->next[k][state];
    }
    return state;
}

/* For each state the cheapest level whose number has that parity, among the even levels or the odd ones and zero, and what it
 * costs; a number is half of a level, rounded up. States lie side by side, and all is computed, so that processors need not
 * guess. */
static void cheapest(const double *size, double highest, const double *bits, double weight, int32_t parity, double *cost,
                     double *level) {
    for (int32_t s = 0; s < TERSE_STATES; s++) {
        const double odd = s & 1, least = (parity ? 2 : 4) - odd, *b = bits + 4 * (s & 1);
        const double clipped = size[s] < highest ? size[s] : highest;
        const double steps = (double)(int32_t)((clipped - least + 2) / 4) * 4;
        const double above = least + (clipped > least + 2 ? steps : 0), below = above - 4, number = (above + odd) / 2;
        const double off = clipped - above, other = clipped - below;
        const double up = weight * off * off + (number < 2 ? b[1] : b[2] + (number - 2) * b[3]);
        double down = weight * other * other + (number < 4 ? b[1] : b[2] + (number - 4) * b[3]);
        down = below < least ? 2 * NEVER : down;
        const double zero = parity ? NEVER : weight * size[s] * size[s] + b[0];
        const double first = up < zero ? up : zero, chosen = up < zero ? above : 0;
        cost[s] = down < first ? down : first;
        level[s] = down < first ? below : chosen;
    }
}

/* One value: paths from each state before it, from those after it. */
static void search(const course *c, history *h, const paths *after, paths *before, int64_t i) {
    const int64_t k = i - h->first, width = c->steps->value_width, start = start_of(i, width) - h->first;
    const double weight = c->steps->weight[i], unit = 1 / (c->own * (c->steps->value[i] * c->step));
    const double *bits = c->steps->bits + (int64_t)c->context[i] * 8;
    double size[2][TERSE_STATES], cost[2][TERSE_STATES], level[2][TERSE_STATES];
    for (int32_t parity = 0; parity < 2; parity++) {
        for (int32_t s = 0; s < TERSE_STATES; s++) {
            double x = after->target[NEXT[s][parity]][k] * unit;
            size[parity][s] = x < 0 ? -x : x;
        }
        cheapest(size[parity], c->steps->highest, bits, weight, parity, cost[parity], level[parity]);
        for (int32_t s = 0; s < TERSE_STATES; s++) cost[parity][s] += after->cost[NEXT[s][parity]];
    }
    for (int32_t s = 0; s < TERSE_STATES; s++) {
        double best = 2 * NEVER, found = 0; /* for costs that are no numbers */
        int32_t next = NEXT[s][0];
        if (cost[0][s] < best) best = cost[0][s], found = level[0][s];
        if (cost[1][s] < best) best = cost[1][s], found = level[1][s], next = NEXT[s][1];
        const double *from = after->target[next];
        double *to = before->target[s];
        before->cost[s] = best;
        h->level[k][s] = (int32_t)(from[k] * unit < 0 ? -found : found);
        h->next[k][s] = (uint8_t)next;
        const int64_t begin = !c->factor || start > k ? k : start > 0 ? start : 0;
        for (int64_t l = 0; l < begin; l++) to[l] = from[l];
        if (begin == k) continue;
        const double *row = c->factor + i * width, error = error_of(c, i, h->level[k][s]);
        for (int64_t l = begin; l < k; l++) to[l] = from[l] + row[l - start] * error;
    }
}

/* What the levels of the values first..first+count-1 add to the coordinates from..to-1 before them. */
static void carry(const course *c, int64_t first, int64_t count, const int32_t *level, double *restrict carried,
                  int64_t from, int64_t to) {
    const int64_t width = c->steps->value_width;
    if (!c->factor) return;
    for (int64_t i = first + count; i > first;) {
        const int64_t start = start_of(i - 1, width), begin = start > from ? start : from, n = to - begin;
        const int64_t least = start > first ? start : first;
        if (n <= 0) { /* as for all values before them */
            i = least;
            continue;
        }
        const double *row = c->factor + i * width + begin - start;
        double *sum = carried + begin - from;
        if (i - least >= 4) { /* together, for the sums need not be fetched so often */
            const double *a = row - width, *b = a - width, *d = b - width, *e = d - width;
            const int32_t *of = level + (i - first);
            const double by_a = error_of(c, i - 1, of[-1]), by_b = error_of(c, i - 2, of[-2]);
            const double by_d = error_of(c, i - 3, of[-3]), by_e = error_of(c, i - 4, of[-4]);
            for (int64_t l = 0; l < n; l++) sum[l] = sum[l] + a[l] * by_a + b[l] * by_b + d[l] * by_d + e[l] * by_e;
            i -= 4;
        } else {
            i--;
            const double *a = row - width, by = error_of(c, i, level[i - first]);
            for (int64_t l = 0; l < n; l++) sum[l] += a[l] * by;
        }
    }
}

/* The targets of a block on the paths from each state: all paths share what is decided and, as a rule, most of what the
 * block behind it holds. */
static void aim(const course *c, const history *past, paths *p, int64_t first, int64_t stop) {
    int32_t trace[TERSE_STATES][BLOCK], state[TERSE_STATES];
    int64_t apart = 0; /* so many values from the block's beginning on the paths differ */
    int32_t any = 0;   /* state whose path does not end */
    while (any < TERSE_STATES - 1 && !(p->cost[any] < NEVER)) any++;
    for (int32_t s = 0; s < TERSE_STATES; s++) state[s] = s;
    for (int64_t k = 0; k < past->count; k++) {
        for (int32_t s = 0; s < TERSE_STATES; s++) {
            trace[s][k] = past->level[k][state[s]];
            state[s] = past->next[k][state[s]];
        }
        for (int32_t s = 0; s < TERSE_STATES; s++)
            if (p->cost[s] < NEVER && trace[s][k] != trace[any][k]) apart = k + 1;
    }
    double shared[BLOCK];
    for (int64_t k = 0; k < stop - first; k++) shared[k] = c->weight[first + k] + c->carried[first + k];
    carry(c, past->first + apart, past->count - apart, trace[any] + apart, shared, first, stop);
    for (int32_t s = 0; s < TERSE_STATES; s++) {
        memcpy(p->target[s], shared, (size_t)(stop - first) * sizeof *shared);
        carry(c, past->first, apart, trace[s], p->target[s], first, stop);
    }
}

/* The levels of a line along the cheapest path through the states that begins in state 0 (Viterbi, each path with the
 * errors of its own levels). Paths that do not share what is decided end there. */
static void trellis(const course *c, int32_t *level) {
    history held[2], *now = &held[0], *past = &held[1];
    paths turns[2], *after = &turns[0], *before = &turns[1];
    int32_t start = 0;
    memset(after->cost, 0, sizeof after->cost);
    past->first = past->count = 0;
    for (int64_t stop = c->steps->values; stop > 0; stop = past->first) {
        now->first = (stop - 1) / BLOCK * BLOCK;
        now->count = stop - now->first;
        aim(c, past, after, now->first, stop);
        for (int64_t i = stop; i-- > now->first;) {
            search(c, now, after, before, i);
            paths *swap = after;
            after = before;
            before = swap;
        }
        start = 0;
        for (int32_t s = 1; s < TERSE_STATES && now->first > 0; s++)
            if (after->cost[s] < after->cost[start]) start = s;
        int32_t met = followed(now, start, 0);
        for (int32_t s = 0; s < TERSE_STATES; s++)
            if (followed(now, s, 0) != met) after->cost[s] = NEVER;
        followed(past, met, level + past->first);
        carry(c, past->first, past->count, level + past->first, c->carried, 0, now->first);
        if (now->first == 0) followed(now, start, level);
        history *swap = past;
        past = now;
        now = swap;
    }
}

/* Each level the nearest, or one less where the bits saved are worth the error. */
static void nearest(const course *c, const uint8_t *kept, int32_t *level) {
    for (int64_t stop = c->steps->values, first; stop > 0; stop = first) {
        first = (stop - 1) / BLOCK * BLOCK;
        for (int64_t i = stop; i-- > first;) {
            const double *price = c->steps->bits + (int64_t)c->context[i] * 8;
            double x = (c->weight[i] + c->carried[i]) / (c->own * (c->steps->value[i] * c->step)), size = x < 0 ? -x : x;
            if (!(size < c->steps->highest)) size = c->steps->highest;
            int32_t k = (int32_t)(size + 0.5);
            if (k > 0 && size - (k - 0.5) < price[k > 1]) k--;
            if (kept && !kept[i]) k = 0;
            level[i] = x < 0 ? -k : k;
            carry(c, i, 1, level + i, c->carried + first, first, i);
        }
        carry(c, first, stop - first, level + first, c->carried, 0, first);
    }
}

/* Takes from the lines from..first-1 what the lines first..stop-1 hold by now, each times its entry of the factor, whose block
 * begins at `start`. */
static void take(const terse_feedback_steps *steps, const double *factor, double *whitened, int64_t start,
                 int64_t from, int64_t first, int64_t stop) {
    const int64_t m = steps->values, width = steps->line_width;
    for (int64_t at = 0, end; at < m; at = end) {
        end = m - at > STRIP ? at + STRIP : m;
        for (int64_t l = from; l < first; l++) {
            double *restrict line = whitened + l * m;
            int64_t j = stop;
            for (; j - first >= 4; j -= 4) {
                const double *a = whitened + (j - 1) * m, *b = a - m, *d = b - m, *e = d - m;
                const double *by = factor + (j - 1) * width + l - start;
                const double by_a = by[0], by_b = by[-width], by_d = by[-2 * width], by_e = by[-3 * width];
                for (int64_t i = at; i < end; i++)
                    line[i] = line[i] - a[i] * by_a - b[i] * by_b - d[i] * by_d - e[i] * by_e;
            }
            for (; j > first; j--) {
                const double *a = whitened + (j - 1) * m, by = factor[(j - 1) * width + l - start];
                for (int64_t i = at; i < end; i++) line[i] -= a[i] * by;
            }
        }
    }
}

int64_t terse_feedback(double *whitened, const double *lines, const double *values, const terse_feedback_steps *steps,
                       int32_t *levels, double *carried, int32_t *context) {
    const int64_t n = steps->lines, m = steps->values;
    if (n < 1 || m < 1 || steps->contexts < 1 || (lines && steps->line_width < 1) || (values && steps->value_width < 1))
        return TERSE_EARGUMENT;
    for (int64_t stop = n, first; stop > 0; stop = first) {
        const int64_t start = lines ? start_of(stop - 1, steps->line_width) : stop - 1;
        first = stop - start > LINES ? stop - LINES : start;
        for (int64_t j = stop; j-- > first;) {
            double *line = whitened + j * m, sum = 0;
            int32_t *level = levels + j * m;
            if (lines) take(steps, lines, whitened, start, j, j + 1, stop);
            course c = {steps, values, line, carried, context, lines ? lines[j * steps->line_width + j - start] : 1,
                        steps->line[j]};
            for (int64_t i = 0; i < m; i++) {
                double x = line[i] / (c.own * (steps->value[i] * c.step));
                if (!steps->kept || steps->kept[j * m + i]) sum += x < 0 ? -x : x;
                carried[i] = 0;
            }
            double mean = sum / (double)m;
            for (int64_t i = 0; i < m; i++) context[i] = context_of(steps, mean * steps->profile[i]);
            if (steps->weight) trellis(&c, level);
            else nearest(&c, steps->kept ? steps->kept + j * m : 0, level);
            for (int64_t i = 0; i < m; i++) line[i] = level[i] * (steps->value[i] * c.step);
        }
        if (lines) take(steps, lines, whitened, start, start, first, stop);
    }
    return n * m;
}
