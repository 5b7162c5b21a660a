/* Rendering one view, LANES values at a time: render_views_core.c includes this once for every instruction set; NAME(x) tells them apart.
 *
 * A view is made in blocks of LANES of its samples down the stored picture. Rows are blended first: a vector holds LANES bytes of a row,
 * and LANES results are transposed, so that a vector of the strip holds one column and channel of the whole block. Then columns are
 * blended, for all rows of the block at once, and colored. A view that does not lie on its side is transposed back on its way out.
 */

/* Parts of two vectors: alternating elements, halves or wholes of every group of four, and groups. */
#if LANES == 4
#define LOW_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5)
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7)
#elif LANES == 8
#define LOW_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVEN_GROUPS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODD_GROUPS(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define LOW_PAIRS(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH_PAIRS(a, b) __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN_GROUPS(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD_GROUPS(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#endif

#define FLOATS NAME(floats)
#define INTS NAME(ints)
#define DOUBLES NAME(doubles)
#define LONGS NAME(longs)
typedef float FLOATS __attribute__((vector_size(4 * LANES)));
typedef int32_t INTS __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef double DOUBLES __attribute__((vector_size(8 * LANES)));
typedef int64_t LONGS __attribute__((vector_size(8 * LANES)));
typedef uint8_t NAME(bytes) __attribute__((vector_size(LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));

static INLINE FLOATS NAME(load)(const float *from)
{
    FLOATS vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

static INLINE void NAME(store)(float *to, FLOATS vector)
{
    memcpy(to, &vector, sizeof vector);
}

static INLINE FLOATS NAME(load_bytes)(const uint8_t *from)
{
#if LANES == 16
    return (FLOATS)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i_u *)from)));
#elif LANES == 8
    return (FLOATS)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i_u *)from)));
#else
    NAME(bytes) levels;
    memcpy(&levels, from, sizeof levels);
    return __builtin_convertvector(__builtin_convertvector(levels, INTS), FLOATS);
#endif
}

static INLINE FLOATS NAME(least)(FLOATS a, FLOATS b)
{
#if LANES == 16
    return (FLOATS)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (FLOATS)_mm256_min_ps((__m256)a, (__m256)b);
#else
    const INTS less = a < b;
    return (FLOATS)((less & (INTS)a) | (~less & (INTS)b));
#endif
}

static INLINE FLOATS NAME(most)(FLOATS a, FLOATS b)
{
#if LANES == 16
    return (FLOATS)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (FLOATS)_mm256_max_ps((__m256)a, (__m256)b);
#else
    const INTS more = a > b;
    return (FLOATS)((more & (INTS)a) | (~more & (INTS)b));
#endif
}

static INLINE FLOATS NAME(clipped)(FLOATS levels)
{
    return NAME(least)(NAME(most)(levels, (FLOATS){0}), (FLOATS){0} + 255.0f);
}

/* Swap rows and columns: first within every four lanes, then by whole groups of four. */
static INLINE void NAME(transpose)(FLOATS rows[LANES])
{
    for (int r = 0; r < LANES; r += 4) {
        const FLOATS a = LOW_PAIRS(rows[r], rows[r + 1]), b = LOW_PAIRS(rows[r + 2], rows[r + 3]);
        const FLOATS c = HIGH_PAIRS(rows[r], rows[r + 1]), d = HIGH_PAIRS(rows[r + 2], rows[r + 3]);
        rows[r] = LOW_HALVES(a, b);
        rows[r + 1] = HIGH_HALVES(a, b);
        rows[r + 2] = LOW_HALVES(c, d);
        rows[r + 3] = HIGH_HALVES(c, d);
    }
#if LANES == 8
    for (int r = 0; r < 4; r++) {
        const FLOATS a = rows[r], b = rows[r + 4];
        rows[r] = EVEN_GROUPS(a, b);
        rows[r + 4] = ODD_GROUPS(a, b);
    }
#elif LANES == 16
    for (int r = 0; r < 4; r++) {
        const FLOATS a = EVEN_GROUPS(rows[r], rows[r + 4]), b = EVEN_GROUPS(rows[r + 8], rows[r + 12]);
        const FLOATS c = ODD_GROUPS(rows[r], rows[r + 4]), d = ODD_GROUPS(rows[r + 8], rows[r + 12]);
        rows[r] = EVEN_GROUPS(a, b);
        rows[r + 4] = EVEN_GROUPS(c, d);
        rows[r + 8] = ODD_GROUPS(a, b);
        rows[r + 12] = ODD_GROUPS(c, d);
    }
#endif
}

/* Round to the nearest, ties to even; the magic number's last bit is worth 1. */
static INLINE INTS NAME(rounded)(FLOATS levels)
{
    return (INTS)(NAME(clipped)(levels) + 12582912.0f) & 0xff;
}

static INLINE NAME(halves) NAME(bfloat16)(FLOATS values)
{
    const NAME(words) bits = (NAME(words))values; /* unsigned: any bits may come, and rounding a NaN carries out */
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, NAME(halves));
}

static INLINE NAME(halves) NAME(float16)(FLOATS values)
{
#if LANES == 16
    return (NAME(halves))_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif LANES == 8
    return (NAME(halves))_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#else
    /* Below 2^-14 adding 0.5 leaves the wanted bits last in the sum; elsewhere the exponent is moved and the tail rounded to even. */
    const NAME(words) sign = (NAME(words))values & 0x80000000u, bits = (NAME(words))values ^ sign;
    const NAME(words) small = (NAME(words))((FLOATS)bits + 0.5f) - 0x3f000000u;
    const NAME(words) normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1)) >> 13;
    const NAME(words) tiny = (NAME(words))(bits < 0x38800000u), huge = (NAME(words))(bits >= 0x47800000u);
    const NAME(words) half = (tiny & small) | (~tiny & ~huge & normal) | (huge & 0x7c00u);
    return __builtin_convertvector(half | sign >> 16, NAME(halves));
#endif
}

/* Write a vector past the cache where the processor can; the place is a multiple of its size. */
static INLINE void NAME(stream)(unsigned char *out, FLOATS values)
{
#if LANES == 16
    _mm512_stream_ps((float *)(void *)out, (__m512)values);
#elif LANES == 8
    _mm256_stream_ps((float *)(void *)out, (__m256)values);
#elif defined(__x86_64__)
    _mm_stream_ps((float *)(void *)out, (__m128)values);
#else
    memcpy(out, &values, sizeof values);
#endif
}

/* Cast LANES values and write the first `count` of them. */
static INLINE void NAME(write)(unsigned char *out, FLOATS values, wf_dtype dtype, int64_t count, bool streamed)
{
    union {
        NAME(bytes) bytes;
        NAME(halves) halves;
        FLOATS floats;
    } cast;
    size_t size = sizeof(float);
    if (dtype == WF_FLOAT32) {
        if (count >= LANES && streamed) {
            NAME(stream)(out, values);
            return;
        }
        if (count >= LANES) {
            memcpy(out, &values, sizeof values);
            return;
        }
        cast.floats = values;
    } else if (dtype == WF_UINT8) {
        cast.bytes = __builtin_convertvector(NAME(rounded)(values), NAME(bytes));
        size = sizeof(uint8_t);
        if (count >= LANES) {
            memcpy(out, &cast.bytes, sizeof cast.bytes);
            return;
        }
    } else {
        cast.halves = dtype == WF_FLOAT16 ? NAME(float16)(values) : NAME(bfloat16)(values);
        size = sizeof(uint16_t);
        if (count >= LANES) {
            memcpy(out, &cast.halves, sizeof cast.halves);
            return;
        }
    }
    memcpy(out, &cast, (size_t)count * size);
}

/* Normalize and write `count` <= LANES neighboring pixels of one row. */
static INLINE void NAME(put)(const wf_target *target, int64_t row, int64_t col, FLOATS r, FLOATS g, FLOATS b, int64_t count)
{
    const FLOATS channels[3] = {r * target->scale[0] + target->shift[0], g * target->scale[1] + target->shift[1],
                                b * target->scale[2] + target->shift[2]};
    unsigned char *out = target->out + row * target->row_bytes + col * target->pixel_bytes;
    if (!target->channels_last) {
        for (int c = 0; c < 3; c++)
            NAME(write)(out + c * target->plane_bytes, channels[c], target->dtype, count, target->streamed);
        return;
    }
    float mixed[3 * LANES];
    for (int lane = 0; lane < LANES; lane++)
        for (int c = 0; c < 3; c++)
            mixed[3 * lane + c] = channels[c][lane];
    for (int64_t done = 0; done < 3 * count; done += LANES)
        NAME(write)(out + done * target->value_bytes, NAME(load)(mixed + done), target->dtype, 3 * count - done, false);
}

static INLINE void NAME(recolor)(const float matrix[12], FLOATS *r, FLOATS *g, FLOATS *b)
{
    const FLOATS x = *r, y = *g, z = *b;
    *r = NAME(clipped)(matrix[0] * x + (matrix[1] * y + (matrix[2] * z + matrix[3])));
    *g = NAME(clipped)(matrix[4] * x + (matrix[5] * y + (matrix[6] * z + matrix[7])));
    *b = NAME(clipped)(matrix[8] * x + (matrix[9] * y + (matrix[10] * z + matrix[11])));
}

static INLINE DOUBLES NAME(smaller)(DOUBLES a, DOUBLES b)
{
    const LONGS less = a < b;
    return (DOUBLES)((less & (LONGS)a) | (~less & (LONGS)b));
}

static INLINE DOUBLES NAME(larger)(DOUBLES a, DOUBLES b)
{
    return -NAME(smaller)(-a, -b);
}

/* The largest whole number that is not above the value, or at a whole number perhaps the one before it. */
static INLINE DOUBLES NAME(whole_below)(DOUBLES value)
{
    return (value - 0.5 + 6755399441055744.0) - 6755399441055744.0;
}

/* Add the sums of t, t d and t d^2 over taps first..last on one side of the center, with t = 1 + slope d: sums of powers in closed form. */
static INLINE void NAME(add_side)(DOUBLES sums[3], DOUBLES center, double slope, DOUBLES first, DOUBLES last)
{
    const DOUBLES n = NAME(larger)(last - first + 1.0, (DOUBLES){0}), mean = 0.5 * (first + last + 1.0) - center;
    const DOUBLES variance = (n * n - 1.0) * (1.0 / 12), second = mean * mean + variance, third = mean * (second + 2.0 * variance);
    sums[0] += n * (1.0 + slope * mean);
    sums[1] += n * (mean + slope * second);
    sums[2] += n * (second + slope * third);
}

/* Add the same sums over taps low..high, all inside the triangle 1 - |d| slope, d from the center to the middle of the tap's pixel. */
static INLINE void NAME(add_triangle)(DOUBLES sums[3], DOUBLES center, double slope, DOUBLES low, DOUBLES high)
{
    const DOUBLES left = -NAME(whole_below)(0.5 - center) - 1.0; /* the last tap left of the center */
    NAME(add_side)(sums, center, slope, low, NAME(smaller)(high, left));
    NAME(add_side)(sums, center, -slope, NAME(larger)(low, left + 1.0), high);
}

/* Where LANES samples of an axis from sample `block` on read, and with which weights. Samples past the last repeat it. With centered weights
 * the triangle is tilted until its first moment is nought. What lies outside the picture falls on its edge pixel. */
static void NAME(place_block)(const wf_axis *axis, int64_t block)
{
    const int64_t taps = axis->taps, last_sample = axis->samples - 1, last_pixel = axis->pixels - 1;
    const double scale = (axis->stop - axis->start) / (double)axis->samples, reach = scale > 1 ? scale : 1, slope = 1 / reach;
    DOUBLES sample;
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t place = block + lane < last_sample ? block + lane : last_sample;
        sample[lane] = (double)(axis->backwards ? last_sample - place : place);
    }
    const DOUBLES center = axis->start + (sample + 0.5) * scale;
    const DOUBLES low = -NAME(whole_below)(reach + 0.5 - center), high = NAME(whole_below)(center + reach - 0.5);
    DOUBLES sums[3] = {{0}};
    NAME(add_triangle)(sums, center, slope, low, high);
    DOUBLES p = 1.0 / sums[0], q = {0}; /* a tap's weight is its triangle times p + q d */
    if (axis->centered) {
        const DOUBLES m = sums[1] * p, spread = sums[2] * p - m * m;
        const DOUBLES tilt = (DOUBLES)((LONGS)(m / spread) & (spread > LEAST_SPREAD));
        q = -tilt * p;
        p += tilt * m * p;
    }
    const DOUBLES first = NAME(larger)(NAME(smaller)(low, (DOUBLES){0} + (double)(axis->pixels - taps)), (DOUBLES){0});
    float *weights = axis->weights + block * taps;
    DOUBLES distance = first + 0.5 - center;
    for (int64_t k = 0; k < taps; k++, distance += 1.0) {
        const DOUBLES triangle = 1.0 - NAME(larger)(distance, -distance) * slope;
        const DOUBLES weight = NAME(larger)(triangle, (DOUBLES){0}) * (p + q * distance);
        NAME(store)(weights + k * LANES, __builtin_convertvector(weight, FLOATS));
    }
    bool leaves = false;
    for (int lane = 0; lane < LANES; lane++) {
        axis->first[block + lane] = (int32_t)first[lane];
        leaves |= low[lane] < 0 || high[lane] > (double)last_pixel;
    }
    if (!leaves)
        return;
    const DOUBLES none = {0}, edge = none + (double)last_pixel;
    DOUBLES before[3] = {{0}}, after[3] = {{0}};
    NAME(add_triangle)(before, center, slope, low, NAME(smaller)(high, none - 1.0));
    NAME(add_triangle)(after, center, slope, NAME(larger)(low, edge + 1.0), high);
    float *const ends[2] = {weights, weights + (taps - 1) * LANES};
    NAME(store)(ends[0], NAME(load)(ends[0]) + __builtin_convertvector(p * before[0] + q * before[1], FLOATS));
    NAME(store)(ends[1], NAME(load)(ends[1]) + __builtin_convertvector(p * after[0] + q * after[1], FLOATS));
}

/* Make the strip's vectors for bytes `from` to `to` of every row, or some more; returns how far it came. */
static INLINE int64_t NAME(blend_rows_by)(const wf_strip *strip, const float *weights, int64_t from, int64_t to, const int64_t taps)
{
    float *const all_levels = strip->levels;
    const int64_t stride = strip->stride, rows = strip->rows;
    for (; from < to; from += TOGETHER * LANES) {
        int64_t x[TOGETHER];
        for (int g = 0; g < TOGETHER; g++)
            x[g] = from + g * LANES < strip->last_load ? from + g * LANES : strip->last_load;
        /* every byte becomes a float once; a row of the picture goes into two rows of the block or more */
        const int64_t here = strip->pixels_start;
        const uint8_t *bytes = strip->pixels + (strip->top - strip->pixels_top) * stride;
        for (int64_t row = 0; row < rows; row++, bytes += stride) {
            __builtin_prefetch((const void *)((uintptr_t)bytes + (uintptr_t)(x[0] - here) + AHEAD_BYTES));
            for (int g = 0; g < TOGETHER; g++)
                NAME(store)(all_levels + (row * TOGETHER + g) * LANES, NAME(load_bytes)(bytes + (x[g] - here)));
        }
        FLOATS blended[TOGETHER][LANES];
        for (int r = 0; r < LANES; r++) {
            const float *levels = all_levels + strip->first[r] * (TOGETHER * LANES), *weight = weights + r;
            FLOATS sum[TOGETHER] = {{0}};
            for (int64_t k = 0; k < taps && k < RUN; k++)
                for (int g = 0; g < TOGETHER; g++)
                    sum[g] += weight[k * LANES] * NAME(load)(levels + (k * TOGETHER + g) * LANES);
            for (int64_t run = RUN; run < taps; run += RUN) { /* summed apart: thousands of roundings in one sum would show */
                FLOATS part[TOGETHER] = {{0}};
                for (int64_t k = run; k < taps && k < run + RUN; k++)
                    for (int g = 0; g < TOGETHER; g++)
                        part[g] += weight[k * LANES] * NAME(load)(levels + (k * TOGETHER + g) * LANES);
                for (int g = 0; g < TOGETHER; g++)
                    sum[g] += part[g];
            }
            for (int g = 0; g < TOGETHER; g++)
                blended[g][r] = sum[g];
        }
        for (int g = 0; g < TOGETHER; g++) {
            NAME(transpose)(blended[g]);
            memcpy(strip->values + (x[g] - strip->start) * LANES, blended[g], sizeof blended[g]);
        }
    }
    return from;
}

static int64_t NAME(blend_rows)(const wf_strip *strip, const float *weights, int64_t from, int64_t to, int64_t taps)
{
    switch (taps) {
        FOR_FEW_TAPS(return NAME(blend_rows_by)(strip, weights, from, to, TAPS))
    default:
        return NAME(blend_rows_by)(strip, weights, from, to, taps);
    }
}

/* LANES columns of the view, each for all rows of the block, from the strip. */
static INLINE void NAME(blend_cols_by)(const wf_strip *strip, const int32_t *first, const float *weights, FLOATS tile[3][LANES],
                                       const int64_t taps)
{
    for (int j = 0; j < LANES; j++) {
        const float *at = strip->values + (3 * (int64_t)first[j] - strip->start) * LANES;
        FLOATS r = {0}, g = {0}, b = {0};
        for (int64_t k = 0; k < taps && k < RUN; k++, at += 3 * LANES) {
            const float weight = weights[k * LANES + j];
            r += weight * NAME(load)(at);
            g += weight * NAME(load)(at + LANES);
            b += weight * NAME(load)(at + 2 * LANES);
        }
        for (int64_t run = RUN; run < taps; run += RUN) {
            FLOATS part_r = {0}, part_g = {0}, part_b = {0};
            for (int64_t k = run; k < taps && k < run + RUN; k++, at += 3 * LANES) {
                const float weight = weights[k * LANES + j];
                part_r += weight * NAME(load)(at);
                part_g += weight * NAME(load)(at + LANES);
                part_b += weight * NAME(load)(at + 2 * LANES);
            }
            r += part_r;
            g += part_g;
            b += part_b;
        }
        tile[0][j] = r;
        tile[1][j] = g;
        tile[2][j] = b;
    }
}

static void NAME(blend_cols)(const wf_strip *strip, const wf_axis *cols, int64_t block, FLOATS tile[3][LANES])
{
    const int32_t *first = cols->first + block;
    const float *weights = cols->weights + block * cols->taps;
    switch (cols->taps) {
        FOR_FEW_TAPS(NAME(blend_cols_by)(strip, first, weights, tile, TAPS); return)
    default:
        NAME(blend_cols_by)(strip, first, weights, tile, cols->taps);
    }
}

/* Color a tile and write the part of it that the view has: LANES samples down from i, LANES across from j. */
static void NAME(finish_tile)(const wf_job *job, int64_t i, int64_t j, FLOATS tile[3][LANES])
{
    const wf_record *record = job->record;
    const wf_target *target = record->sigma_px > 0 ? &job->blur.target : job->staged ? &job->stage : &job->target;
    const int64_t row = target == &job->stage ? 0 : i;
    const int64_t down = job->rows.samples - i < LANES ? job->rows.samples - i : LANES;
    const int64_t across = job->cols.samples - j < LANES ? job->cols.samples - j : LANES;
    if (record->recolored)
        for (int k = 0; k < LANES; k++)
            NAME(recolor)(record->matrix, &tile[0][k], &tile[1][k], &tile[2][k]);
    if (record->solarized && record->sigma_px == 0)
        for (int c = 0; c < 3; c++)
            for (int k = 0; k < LANES; k++)
                tile[c][k] = NAME(least)(tile[c][k], 255.0f - tile[c][k]);
    if (job->on_its_side) {
        for (int64_t k = 0; k < across; k++)
            NAME(put)(target, j + k, i, tile[0][k], tile[1][k], tile[2][k], down);
        return;
    }
    for (int c = 0; c < 3; c++)
        NAME(transpose)(tile[c]);
    for (int64_t k = 0; k < down; k++)
        NAME(put)(target, row + k, j, tile[0][k], tile[1][k], tile[2][k], across);
}

/* Copy bytes, whole lines of them past the cache. */
static void NAME(copy_past_cache)(unsigned char *to, const unsigned char *from, int64_t bytes)
{
    const int64_t head = clamped(-(intptr_t)to & (LINE_BYTES - 1), 0, bytes);
    const int64_t lines_end = head + (bytes - head) / LINE_BYTES * LINE_BYTES;
    memcpy(to, from, (size_t)head);
    for (int64_t at = head; at < lines_end; at += 4 * LANES) {
        FLOATS part;
        memcpy(&part, from + at, sizeof part);
        NAME(stream)(to + at, part);
    }
    memcpy(to + lines_end, from + lines_end, (size_t)(bytes - lines_end));
}

/* Move finished rows `first` to `last` from where they were staged into the view. */
static void NAME(flush_rows)(const wf_job *job, int64_t first, int64_t last)
{
    const wf_target *stage = &job->stage, *target = &job->target;
    for (int plane = 0; plane < (target->channels_last ? 1 : 3); plane++)
        NAME(copy_past_cache)(target->out + plane * target->plane_bytes + first * target->row_bytes,
                              stage->out + plane * stage->plane_bytes, (last - first + 1) * target->row_bytes);
}

/* Blend and finish all tiles of a view: into planes of levels if it is to be blurred. */
static void NAME(resize)(wf_job *job)
{
    const wf_axis *rows = &job->rows, *cols = &job->cols;
    wf_strip *strip = &job->strip;
    const int64_t blocks = (cols->samples + LANES - 1) / LANES;
    const bool rightwards = cols->first[0] <= cols->first[cols->samples - 1];
    strip->start = 3 * (int64_t)(rightwards ? cols->first[0] : cols->first[cols->samples - 1]);
    strip->start = strip->start < strip->last_load ? strip->start : strip->last_load;
    for (int64_t i = 0; i < rows->samples; i += LANES) {
        const int32_t first = rows->first[i], last = rows->first[i + LANES - 1];
        strip->top = first < last ? first : last;
        strip->rows = (first < last ? last : first) - strip->top + rows->taps;
        for (int r = 0; r < LANES; r++)
            strip->first[r] = rows->first[i + r] - strip->top;
        int64_t done = strip->start;
        for (int64_t block = 0; block < blocks; block++) { /* in the stored picture's order, so that the strip is read while it is hot */
            const int64_t j = (rightwards ? block : blocks - 1 - block) * LANES;
            const int64_t furthest = rightwards ? cols->first[j + LANES - 1] : cols->first[j];
            FLOATS tile[3][LANES];
            done = NAME(blend_rows)(strip, rows->weights + i * rows->taps, done, 3 * (furthest + cols->taps), rows->taps);
            NAME(blend_cols)(strip, cols, j, tile);
            NAME(finish_tile)(job, i, j, tile);
        }
        if (job->staged && job->record->sigma_px == 0)
            NAME(flush_rows)(job, i, (i + LANES < rows->samples ? i + LANES : rows->samples) - 1);
    }
}

/* Blur planes of levels, row by row: down into a line that is then given a mirrored border, and along the line into the view. */
static void NAME(blur)(const wf_job *job)
{
    const wf_blur *blur = &job->blur;
    const wf_target *target = job->staged ? &job->stage : &job->target;
    const int64_t radius = blur->radius, stride = blur->stride, step = stride + 2 * radius, last = job->width - 1;
    const float *gaussian = blur->gaussian;
    for (int64_t row = 0; row < job->height; row++) {
        const int64_t *from = blur->mirrored_rows + radius + row;
        for (int c = 0; c < 3; c++) {
            const float *plane = blur->planes + c * job->height * stride;
            float *line = blur->lines + c * step + radius;
            for (int64_t x = 0; x < stride; x += 2 * LANES) {
                FLOATS near = gaussian[0] * NAME(load)(plane + from[0] + x), far = gaussian[0] * NAME(load)(plane + from[0] + x + LANES);
                for (int64_t k = 1; k <= radius; k++) {
                    const float *above = plane + from[-k] + x, *below = plane + from[k] + x;
                    near += gaussian[k] * (NAME(load)(above) + NAME(load)(below));
                    far += gaussian[k] * (NAME(load)(above + LANES) + NAME(load)(below + LANES));
                }
                NAME(store)(line + x, near);
                NAME(store)(line + x + LANES, far);
            }
            for (int64_t k = 1; k <= radius; k++) { /* by turns, so that each finds its image however short the line is */
                line[-k] = line[last > 0 ? k : 0];
                line[last + k] = line[last > 0 ? last - k : 0];
            }
        }
        for (int64_t x = 0; x < job->width; x += LANES) {
            const float *line = blur->lines + radius + x;
            FLOATS r = gaussian[0] * NAME(load)(line), g = gaussian[0] * NAME(load)(line + step);
            FLOATS b = gaussian[0] * NAME(load)(line + 2 * step);
            for (int64_t k = 1; k <= radius; k++) {
                r += gaussian[k] * (NAME(load)(line - k) + NAME(load)(line + k));
                g += gaussian[k] * (NAME(load)(line + step - k) + NAME(load)(line + step + k));
                b += gaussian[k] * (NAME(load)(line + 2 * step - k) + NAME(load)(line + 2 * step + k));
            }
            if (job->record->solarized) {
                r = NAME(least)(r, 255.0f - r);
                g = NAME(least)(g, 255.0f - g);
                b = NAME(least)(b, 255.0f - b);
            }
            NAME(put)(target, job->staged ? row % LANES : row, x, r, g, b, job->width - x < LANES ? job->width - x : LANES);
        }
        if (job->staged && (row % LANES == LANES - 1 || row == job->height - 1))
            NAME(flush_rows)(job, row / LANES * LANES, row);
    }
}

/* Return false, with nothing written, if the view reads what is not there. */
static bool NAME(render_view)(wf_job *job)
{
    for (int64_t block = 0; block < job->rows.samples; block += LANES)
        NAME(place_block)(&job->rows, block);
    for (int64_t block = 0; block < job->cols.samples; block += LANES)
        NAME(place_block)(&job->cols, block);
    const wf_part *part = &job->part;
    if (!reads_within(&job->rows, part->top, part->height) || !reads_within(&job->cols, part->left, part->width))
        return false;
    NAME(resize)(job);
    if (job->record->sigma_px > 0)
        NAME(blur)(job);
    return true;
}

#undef FLOATS
#undef INTS
#undef DOUBLES
#undef LONGS
#undef LOW_PAIRS
#undef HIGH_PAIRS
#undef LOW_HALVES
#undef HIGH_HALVES
#undef EVEN_GROUPS
#undef ODD_GROUPS
#undef LANES
#undef SUFFIX
