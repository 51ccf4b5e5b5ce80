#include "terse.h"

#include <string.h>

/* Lines (rows of a weight) from the last to the first, and in each its values from the last to the first: each level makes
 * up for what the levels before it have added to its own coordinate of the error. Sums run in one order, so
 * that any machine that does not fuse multiplications with additions finds the same levels. */

#define BLOCK 32 /* a level is decided when one to two blocks behind it were searched */
#define NEVER 1e300

static const uint8_t NEXT[TERSE_STATES][2] = TERSE_NEXT;

typedef struct {
    const terse_feedback_steps *steps;
    const double *factor; /* of the values of a line, its diagonal all ones, or NULL */
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
    int32_t context = 0;
    while (context < steps->contexts - 1 && mean >= steps->edge[context]) context++;
    return context;
}

static double error_of(const course *c, int64_t i, int32_t level) {
    return c->weight[i] - level * (c->steps->value[i] * c->step) * c->own;
}

/* The levels of the path that begins in a state, and the state in which it leaves the block. */
static int32_t followed(const history *h, int32_t state, int32_t *level) {
    for (int64_t k = 0; k < h->count; k++) {
        if (level) level[k] = h->level[k][state];
        state = h->next[k][state];
    }
    return state;
}

/* The cheapest level with that parity of its number, among the even levels or the odd ones and zero; a number is half of
 * a level, rounded up. */
static int32_t cheapest(const terse_feedback_steps *steps, double size, const double *bits, double weight, int32_t odd,
                        int32_t parity, double *cost) {
    int32_t least = parity ? 2 - odd : 4 - odd, found = 0;
    *cost = parity ? NEVER : weight * size * size + bits[0];
    if (!(size < steps->highest)) size = steps->highest;
    int32_t level = least;
    if (size > least + 2) level += (int32_t)((size - least + 2) / 4) * 4;
    for (int32_t last = level - 4; level >= least && level >= last; level -= 4) {
        int32_t number = (level + odd) / 2;
        double off = size - level, own = weight * off * off + (number < 2 ? bits[1] : bits[2] + (number - 2) * bits[3]);
        if (own < *cost) *cost = own, found = level;
    }
    return found;
}

/* One value: paths from each state before it, from those after it. */
static void search(const course *c, history *h, const paths *after, paths *before, int64_t i) {
    const int64_t k = i - h->first;
    const double weight = c->steps->weight[i], unit = 1 / (c->own * (c->steps->value[i] * c->step));
    const double *bits = c->steps->bits + (int64_t)c->context[i] * 8;
    for (int32_t s = 0; s < TERSE_STATES; s++) {
        before->cost[s] = 2 * NEVER;
        h->level[k][s] = 0; /* for costs that are no numbers */
        h->next[k][s] = NEXT[s][0];
        for (int32_t parity = 0; parity < 2; parity++) {
            int32_t next = NEXT[s][parity], odd = s & 1, level;
            double x = after->target[next][k] * unit, cost;
            level = cheapest(c->steps, x < 0 ? -x : x, bits + 4 * odd, weight, odd, parity, &cost);
            cost += after->cost[next];
            if (cost < before->cost[s]) {
                before->cost[s] = cost;
                h->level[k][s] = x < 0 ? -level : level;
                h->next[k][s] = (uint8_t)next;
            }
        }
        const double *from = after->target[h->next[k][s]];
        if (!c->factor) {
            memcpy(before->target[s], from, (size_t)k * sizeof *from);
            continue;
        }
        const double *row = c->factor + i * c->steps->values + h->first, error = error_of(c, i, h->level[k][s]);
        double *to = before->target[s];
        for (int64_t l = 0; l < k; l++) to[l] = from[l] + row[l] * error;
    }
}

/* What the levels of a block add to the coordinates from..to-1. */
static void carry(const course *c, const history *h, const int32_t *level, double *carried, int64_t from, int64_t to) {
    for (int64_t k = h->count; k-- > 0 && c->factor;) {
        const double *row = c->factor + (h->first + k) * c->steps->values, error = error_of(c, h->first + k, level[k]);
        for (int64_t l = from; l < to; l++) carried[l - from] += row[l] * error;
    }
}

/* The levels of a line along the cheapest path through the states that begins in state 0 (Viterbi, each path with the
 * errors of its own levels). Paths that do not share what is decided end there. */
static void trellis(const course *c, int32_t *level) {
    history held[2], *now = &held[0], *past = &held[1];
    paths turns[2], *after = &turns[0], *before = &turns[1];
    int32_t trace[BLOCK], start = 0;
    memset(after->cost, 0, sizeof after->cost);
    past->first = past->count = 0;
    for (int64_t stop = c->steps->values; stop > 0; stop = past->first) {
        now->first = (stop - 1) / BLOCK * BLOCK;
        now->count = stop - now->first;
        for (int32_t s = 0; s < TERSE_STATES; s++) {
            for (int64_t k = 0; k < now->count; k++)
                after->target[s][k] = c->weight[now->first + k] + c->carried[now->first + k];
            followed(past, s, trace);
            carry(c, past, trace, after->target[s], now->first, stop);
        }
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
        carry(c, past, level + past->first, c->carried, 0, now->first);
        if (now->first == 0) followed(now, start, level);
        history *swap = past;
        past = now;
        now = swap;
    }
}

/* Each level the nearest, or one less where the bits saved are worth the error. */
static void nearest(const course *c, const uint8_t *kept, int32_t *level) {
    for (int64_t i = c->steps->values; i-- > 0;) {
        const double *price = c->steps->bits + (int64_t)c->context[i] * 8;
        double x = (c->weight[i] + c->carried[i]) / (c->own * (c->steps->value[i] * c->step)), size = x < 0 ? -x : x;
        if (!(size < c->steps->highest)) size = c->steps->highest;
        int32_t k = (int32_t)(size + 0.5);
        if (k > 0 && size - (k - 0.5) < price[k > 1]) k--;
        if (kept && !kept[i]) k = 0;
        level[i] = x < 0 ? -k : k;
        const double *row = c->factor + i * c->steps->values, error = error_of(c, i, level[i]);
        for (int64_t l = 0; l < i && c->factor; l++) c->carried[l] += row[l] * error;
    }
}

int64_t terse_feedback(double *whitened, const double *lines, const double *values, const terse_feedback_steps *steps,
                       int32_t *levels, double *carried, int32_t *context) {
    const int64_t n = steps->lines, m = steps->values;
    if (n < 1 || m < 1 || steps->contexts < 1) return TERSE_EARGUMENT;
    for (int64_t j = n; j-- > 0;) {
        double *line = whitened + j * m, sum = 0;
        int32_t *level = levels + j * m;
        course c = {steps, values, line, carried, context, lines ? lines[j * n + j] : 1, steps->line[j]};
        for (int64_t i = 0; i < m; i++) {
            double x = line[i] / (c.own * (steps->value[i] * c.step));
            if (!steps->kept || steps->kept[j * m + i]) sum += x < 0 ? -x : x;
            carried[i] = 0;
        }
        double mean = sum / (double)m;
        for (int64_t i = 0; i < m; i++) context[i] = context_of(steps, mean * steps->profile[i]);
        if (steps->weight) trellis(&c, level);
        else nearest(&c, steps->kept ? steps->kept + j * m : 0, level);
        for (int64_t i = 0; i < m; i++) carried[i] = level[i] * (steps->value[i] * c.step);
        for (int64_t l = 0; l < j && lines; l++) {
            double *other = whitened + l * m, by = lines[j * n + l];
            for (int64_t i = 0; i < m; i++) other[i] -= carried[i] * by;
        }
    }
    return n * m;
}
