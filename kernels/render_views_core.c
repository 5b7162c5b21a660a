/* The CPU view kernel without Python: records checked and folded, memory laid out, pictures handed to threads, views rendered by the
 * instruction set that was chosen. The arithmetic on pixels is in render_views_lanes.h, included below once for each.
 */
#include "render_views_core.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__) /* what lies between the parts of a scratch must not be touched either */
#include <sanitizer/asan_interface.h>
#define FORBID(memory, bytes) ASAN_POISON_MEMORY_REGION(memory, bytes)
#define ALLOW(memory, bytes) ASAN_UNPOISON_MEMORY_REGION(memory, bytes)
#else
#define FORBID(memory, bytes) ((void)(memory))
#define ALLOW(memory, bytes) ((void)(memory))
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define LINE_BYTES 64
#define TOGETHER 4                 /* vectors of a row that share the reading of a weight; at 16 lanes a line of the cache */
#define AHEAD_BYTES 128            /* of each row, prefetched: there are more rows than a processor follows by itself */
#define STREAMED_BYTES (8LL << 20) /* of views; more of them go past the cache, which would read each line before it is written */
#define MOST_BYTES (1LL << 47)     /* of a family's views: what a processor addresses */
#define RUN 64                     /* taps that are summed on their own where there are many */
#define LEAST_SPREAD 1e-12         /* px^2; below it one tap has all the weight and nothing can be centered */

/* One view's record, checked. */
typedef struct {
    double box[4]; /* xyxy in the upright picture */
    float matrix[12];
    float sigma_px; /* 0: none */
    uint8_t flipped, quarter_turns, solarized, recolored;
} wf_record;

struct wf_plan {
    int64_t pictures;
    int families;
    wf_instruction_set set;
    bool streams;         /* the views of the batch are too many for the cache */
    uint8_t *orientation; /* (B,) */
    wf_family *family;
    wf_record **records; /* [families] of (B, V) */
};

/* One axis of a view on the stored picture. Sample i of the finished view reads pixels first[i] .. first[i] + taps - 1. */
typedef struct {
    double start, stop; /* of the box */
    int64_t pixels, samples, taps;
    bool backwards; /* the view counts its samples from the far end */
    bool centered;
    int32_t *first; /* [samples, up to a multiple of the lanes] */
    float *weights; /* [the same / lanes][taps][lanes] */
} wf_axis;

/* The picture, and the memory for one block of rows: `levels` of the picture's rows that it needs, some columns at a time, and blended
 * `values`, a vector of rows for each byte from `start` on. */
typedef struct {
    const uint8_t *pixels;
    int64_t stride;
    int64_t pixels_top, pixels_start; /* the picture's row, and the byte of it, that `pixels` begins with */
    int64_t start, last_load; /* bytes from a row's beginning; a load from past last_load would leave the row */
    int64_t top, rows;        /* of the picture */
    int64_t first[16];        /* of each row of the block: its first tap, counted from the top */
    float *levels, *values;
} wf_strip;

/* Where finished values go, and how. */
typedef struct {
    unsigned char *out;
    int64_t row_bytes, plane_bytes;
    int32_t pixel_bytes, value_bytes;
    wf_dtype dtype;
    bool channels_last;
    bool streamed; /* a vector is a line of the cache and goes past it by itself */
    float scale[3], shift[3];
} wf_target;

typedef struct {
    int64_t radius, stride; /* floats from row to row of a plane */
    float *planes;          /* (3, height, stride) levels */
    float *lines;           /* (3, radius + stride + radius) */
    float *gaussian;        /* [radius + 1], by distance */
    int64_t *mirrored_rows; /* [radius + height + radius], where each begins in a plane */
    wf_target target;       /* the planes */
} wf_blur;

typedef struct {
    const wf_record *record;
    int64_t height, width; /* of the finished view */
    wf_part part;          /* of the stored picture: what is there */
    bool on_its_side;      /* the stored picture's rows become the view's columns */
    wf_axis rows, cols;    /* of the stored picture */
    wf_strip strip;
    wf_blur blur;
    wf_target target;
    bool staged; /* finished rows are gathered in `stage`, LANES of them, and moved on past the cache */
    wf_target stage;
} wf_job;

static INLINE int64_t padded_to(int64_t count, int64_t multiple)
{
    return (count + multiple - 1) / multiple * multiple;
}

static INLINE int64_t clamped(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

/* floor and ceil without a library call, for numbers far smaller than the offset */
static INLINE int64_t floor_of(double value)
{
    return (int64_t)(value + (1 << 24)) - (1 << 24);
}

static INLINE int64_t ceil_of(double value)
{
    return -floor_of(-value);
}

/* Position i of an axis that is mirrored about the centers of its edge pixels, as often as it takes. */
static INLINE int64_t mirrored(int64_t i, int64_t length)
{
    const int64_t period = length > 1 ? 2 * (length - 1) : 1;
    const int64_t place = (i % period + period) % period;
    return place < length ? place : period - place;
}

/* Return whether the pixels that an axis reads, its samples placed, are among the `length` from `start` on. */
static INLINE bool reads_within(const wf_axis *axis, int64_t start, int64_t length)
{
    const int32_t one = axis->first[0], other = axis->first[axis->samples - 1]; /* samples stand in order, or backwards */
    return (one < other ? one : other) >= start && (one < other ? other : one) + axis->taps <= start + length;
}

#define GLUE(x, y) x##_##y
#define GLUED(x, y) GLUE(x, y)
#define NAME(x) GLUED(x, SUFFIX)

/* A loop over taps is worth unrolling where there are few: run a statement that calls it with the constant TAPS. */
#define FOR_FEW_TAPS(...)                                                                                                                  \
    WITH_TAPS(1, __VA_ARGS__) WITH_TAPS(2, __VA_ARGS__) WITH_TAPS(3, __VA_ARGS__) WITH_TAPS(4, __VA_ARGS__)                                \
    WITH_TAPS(5, __VA_ARGS__) WITH_TAPS(6, __VA_ARGS__) WITH_TAPS(7, __VA_ARGS__) WITH_TAPS(8, __VA_ARGS__)
#define WITH_TAPS(N, ...)                                                                                                                  \
    case N: {                                                                                                                              \
        enum { TAPS = N };                                                                                                                 \
        __VA_ARGS__;                                                                                                                       \
    }

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define SUFFIX baseline
#define LANES 4
#include "render_views_lanes.h"

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma,f16c")
#define SUFFIX avx2
#define LANES 8
#include "render_views_lanes.h"
END_TARGET
BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#define SUFFIX avx512
#define LANES 16
#include "render_views_lanes.h"
END_TARGET
#endif

static const struct {
    int lanes;
    bool (*render_view)(wf_job *);
} BUILT[WF_INSTRUCTION_SETS] = {
    [WF_BASELINE] = {4, render_view_baseline},
#if defined(__x86_64__)
    [WF_AVX2] = {8, render_view_avx2},
    [WF_AVX512] = {16, render_view_avx512},
#endif
};

bool wf_has_instruction_set(wf_instruction_set set)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    switch (set) {
    case WF_BASELINE:
        return true;
#if defined(__x86_64__)
    case WF_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case WF_AVX512:
        return wf_has_instruction_set(WF_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    default:
        return false;
    }
}

wf_instruction_set wf_best_instruction_set(void)
{
    return wf_has_instruction_set(WF_AVX512) ? WF_AVX512 : wf_has_instruction_set(WF_AVX2) ? WF_AVX2 : WF_BASELINE;
}

static int32_t value_bytes(wf_dtype dtype)
{
    return dtype == WF_FLOAT32 ? 4 : dtype == WF_UINT8 ? 1 : 2;
}

static bool within(float value, float limit)
{
    return value >= -limit && value <= limit; /* false for NaN */
}

/* Return whether view v of picture b can be rendered, or say why not. */
static bool check_record(const wf_family *family, int64_t b, int64_t v, char message[WF_MESSAGE_BYTES])
{
    const int64_t at = b * family->views + v;
    const float *box = family->boxes + 4 * at;
    const float limit = WF_LARGEST_SIDE_PX;
    const bool near = within(box[0], limit) && within(box[1], limit) && within(box[2], limit) && within(box[3], limit);
    if (!(near && box[0] < box[2] && box[1] < box[3])) {
        snprintf(message, WF_MESSAGE_BYTES,
                 "boxes[%lld, %lld] is (%g, %g, %g, %g): needs x0 < x1 and y0 < y1, all within %d pixels of the corner", (long long)b,
                 (long long)v, (double)box[0], (double)box[1], (double)box[2], (double)box[3], WF_LARGEST_SIDE_PX);
        return false;
    }
    if (family->quarter_turns[at] < 0 || family->quarter_turns[at] > 3) {
        snprintf(message, WF_MESSAGE_BYTES, "quarter_turns[%lld, %lld] is %lld: take 0 to 3", (long long)b, (long long)v,
                 (long long)family->quarter_turns[at]);
        return false;
    }
    if (family->blur_sigma_px && !(family->blur_sigma_px[at] >= 0 && family->blur_sigma_px[at] <= WF_LARGEST_SIGMA_PX)) {
        snprintf(message, WF_MESSAGE_BYTES, "blur_sigma_px[%lld, %lld] is %g: needs 0 to %d, 0 for none", (long long)b, (long long)v,
                 (double)family->blur_sigma_px[at], WF_LARGEST_SIGMA_PX);
        return false;
    }
    for (int k = 0; family->matrix && k < 12; k++)
        if (!within(family->matrix[12 * at + k], WF_LARGEST_MATRIX_ENTRY)) {
            snprintf(message, WF_MESSAGE_BYTES, "matrix[%lld, %lld, %d, %d] is %g: needs a number within %d", (long long)b, (long long)v,
                     k / 4, k % 4, (double)family->matrix[12 * at + k], WF_LARGEST_MATRIX_ENTRY);
            return false;
        }
    return true;
}

static wf_record fold_record(const wf_family *family, int64_t at)
{
    static const float IDENTITY[12] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0};
    wf_record record = {
        .flipped = family->flipped[at] != 0,
        .quarter_turns = (uint8_t)family->quarter_turns[at],
        .solarized = family->solarized && family->solarized[at],
        .sigma_px = family->blur_sigma_px ? family->blur_sigma_px[at] : 0,
    };
    for (int k = 0; k < 4; k++)
        record.box[k] = family->boxes[4 * at + k];
    if (family->matrix) {
        memcpy(record.matrix, family->matrix + 12 * at, sizeof record.matrix);
        for (int k = 0; k < 12; k++)
            record.recolored |= record.matrix[k] != IDENTITY[k];
    }
    return record;
}

/* Count the bytes of a family's views; false if there are more than can be addressed. */
static bool count_bytes(const wf_family *family, int64_t pictures, int64_t *bytes)
{
    const int64_t view = 3 * family->height * family->width * value_bytes(family->dtype);
    return !__builtin_mul_overflow(pictures, family->views, bytes) && !__builtin_mul_overflow(*bytes, view, bytes) &&
           *bytes <= MOST_BYTES;
}

static bool check_family(const wf_family *family, int64_t pictures, const uint8_t *orientation, char message[WF_MESSAGE_BYTES])
{
    if (family->height < 1 || family->width < 1 || family->height > WF_LARGEST_VIEW_SIDE_PX || family->width > WF_LARGEST_VIEW_SIDE_PX) {
        snprintf(message, WF_MESSAGE_BYTES, "size_px is (%lld, %lld): needs sides of 1 to %d", (long long)family->height,
                 (long long)family->width, WF_LARGEST_VIEW_SIDE_PX);
        return false;
    }
    if ((unsigned)family->dtype > WF_FLOAT32) {
        snprintf(message, WF_MESSAGE_BYTES, "dtype is %d: needs 0 to %d", (int)family->dtype, WF_FLOAT32);
        return false;
    }
    int64_t bytes;
    if (family->views < 0 || !count_bytes(family, pictures, &bytes)) {
        snprintf(message, WF_MESSAGE_BYTES, "a family has %lld views of %lld pictures: needs as many as memory can hold",
                 (long long)family->views, (long long)pictures);
        return false;
    }
    for (int64_t b = 0; b < pictures; b++) {
        if (orientation && (orientation[b] < 1 || orientation[b] > 8)) {
            snprintf(message, WF_MESSAGE_BYTES, "orientation[%lld] is %d: EXIF knows 1 to 8", (long long)b, orientation[b]);
            return false;
        }
        for (int64_t v = 0; v < family->views; v++)
            if (!check_record(family, b, v, message))
                return false;
    }
    return true;
}

wf_status wf_plan_make(wf_plan **made, int64_t pictures, const uint8_t *orientation, int families, const wf_family *family,
                       wf_instruction_set set, char message[WF_MESSAGE_BYTES])
{
    *made = NULL;
    snprintf(message, WF_MESSAGE_BYTES, "no memory for the records of %lld pictures", (long long)pictures);
    if (pictures < 0 || families < 0 || !wf_has_instruction_set(set)) {
        snprintf(message, WF_MESSAGE_BYTES, "%lld pictures, %d families, instruction set %d", (long long)pictures, families, (int)set);
        return WF_BAD_RECORD;
    }
    for (int f = 0; f < families; f++)
        if (!check_family(&family[f], pictures, orientation, message))
            return WF_BAD_RECORD;
    wf_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return WF_NO_MEMORY;
    *plan = (wf_plan){.pictures = pictures, .families = families, .set = set};
    plan->orientation = malloc((size_t)pictures + 1);
    plan->family = calloc((size_t)families + 1, sizeof *plan->family);
    plan->records = calloc((size_t)families + 1, sizeof *plan->records);
    bool enough = plan->orientation && plan->family && plan->records;
    for (int f = 0; enough && f < families; f++) {
        const int64_t count = pictures * family[f].views;
        plan->family[f] = family[f];
        plan->records[f] = calloc((size_t)count + 1, sizeof **plan->records);
        enough = plan->records[f] != NULL;
        for (int64_t at = 0; enough && at < count; at++)
            plan->records[f][at] = fold_record(&family[f], at);
    }
    if (!enough) {
        wf_plan_free(plan);
        return WF_NO_MEMORY;
    }
    int64_t all_bytes = 0, bytes;
    for (int f = 0; f < families && count_bytes(&family[f], pictures, &bytes) && all_bytes <= STREAMED_BYTES; f++)
        all_bytes += bytes;
    plan->streams = all_bytes > STREAMED_BYTES;
    for (int64_t b = 0; b < pictures; b++)
        plan->orientation[b] = orientation ? orientation[b] : 1;
    *made = plan;
    return WF_DONE;
}

void wf_plan_free(wf_plan *plan)
{
    if (!plan)
        return;
    for (int f = 0; plan->records && f < plan->families; f++)
        free(plan->records[f]);
    free(plan->records);
    free(plan->family);
    free(plan->orientation);
    free(plan);
}

int64_t wf_plan_pictures(const wf_plan *plan)
{
    return plan->pictures;
}

struct wf_scratch {
    size_t bytes;
    unsigned char *memory;
};

enum { KEPT_SCRATCHES = 256, KEPT_SCRATCH_BYTES = 64 << 20 };

static _Atomic(wf_scratch *) kept_scratches[KEPT_SCRATCHES]; /* exchanged without a lock: a fork leaves nothing locked */

wf_scratch *wf_scratch_take(size_t bytes)
{
    wf_scratch *scratch = NULL;
    for (int i = 0; !scratch && i < KEPT_SCRATCHES; i++)
        if (atomic_load_explicit(&kept_scratches[i], memory_order_relaxed))
            scratch = atomic_exchange(&kept_scratches[i], NULL);
    if (!scratch)
        scratch = calloc(1, sizeof *scratch);
    if (!scratch)
        return NULL;
    if (scratch->bytes < bytes) {
        free(scratch->memory);
        scratch->bytes = (size_t)padded_to((int64_t)(bytes + bytes / 4), LINE_BYTES);
        scratch->memory = aligned_alloc(LINE_BYTES, scratch->bytes);
    }
    if (!scratch->memory) {
        free(scratch);
        return NULL;
    }
    ALLOW(scratch->memory, scratch->bytes);
    return scratch;
}

unsigned char *wf_scratch_memory(wf_scratch *scratch)
{
    return scratch->memory;
}

void wf_scratch_give(wf_scratch *scratch)
{
    for (int i = 0; scratch->bytes <= KEPT_SCRATCH_BYTES && i < KEPT_SCRATCHES; i++) {
        wf_scratch *none = NULL;
        if (atomic_compare_exchange_strong(&kept_scratches[i], &none, scratch))
            return;
    }
    free(scratch->memory);
    free(scratch);
}

/* Hand out the next part of a block, or with memory = NULL only count. */
static void *carve(unsigned char *memory, size_t *used, int64_t count, size_t size)
{
    const size_t bytes = (size_t)count * size;
    void *part = memory ? memory + *used : NULL;
    if (memory)
        ALLOW(part, bytes);
    *used += (size_t)padded_to((int64_t)bytes, LINE_BYTES) + LINE_BYTES; /* the line between parts is nobody's */
    return part;
}

/* The record of view v on a picture as stored: EXIF, mirror and turn become a transposition and two directions. */
static wf_job make_job(const wf_plan *plan, int f, int64_t b, int64_t v, const wf_picture *picture)
{
    const wf_family *family = &plan->family[f];
    const wf_record *record = &plan->records[f][b * family->views + v];
    /* what undoes each EXIF orientation: a mirror, then quarter turns. Source: CIPA DC-008 (EXIF 3.0), tag 0x0112 */
    static const uint8_t UNDO_MIRROR[9] = {0, 0, 1, 0, 1, 1, 0, 1, 0}, UNDO_TURNS[9] = {0, 0, 0, 2, 2, 1, 3, 3, 1};
    const uint8_t mirror = UNDO_MIRROR[plan->orientation[b]], turns = UNDO_TURNS[plan->orientation[b]];
    /* after a mirror and turns, (row, col) comes from (row, col) or if odd (col, row), each counted from the far end or not */
    const bool lying = turns & 1, stored_y_back = turns >= 2, stored_x_back = (turns == 1 || turns == 2) != (mirror != 0);
    const bool odd = record->quarter_turns & 1, y_back = record->quarter_turns >= 2;
    const bool x_back = (record->quarter_turns == 1 || record->quarter_turns == 2) != (record->flipped != 0);
    const int64_t samples_y = odd ? family->width : family->height, samples_x = odd ? family->height : family->width;

    wf_axis axes[2]; /* down the stored picture, across it */
    for (int stored = 0; stored < 2; stored++) {
        const bool is_y = (stored == 0) != lying; /* of the upright picture */
        const bool far_end = stored == 0 ? stored_y_back : stored_x_back;
        const double start = record->box[is_y ? 1 : 0], stop = record->box[is_y ? 3 : 2];
        const int64_t pixels = stored == 0 ? picture->height : picture->width, samples = is_y ? samples_y : samples_x;
        const double scale = (stop - start) / (double)samples;
        const int64_t reach = ceil_of(2 * (scale > 1 ? scale : 1));
        axes[stored] = (wf_axis){
            .start = far_end ? (double)pixels - stop : start,
            .stop = far_end ? (double)pixels - start : stop,
            .pixels = pixels,
            .samples = samples,
            .taps = reach < pixels ? reach : pixels,
            .backwards = (is_y ? y_back : x_back) != far_end,
            .centered = family->centered,
        };
    }
    const int32_t value = value_bytes(family->dtype), pixel = family->channels_last ? 3 * value : value;
    const int64_t area = family->height * family->width;
    wf_job job = {
        .record = record,
        .height = family->height,
        .width = family->width,
        .on_its_side = lying != odd,
        .rows = axes[0],
        .cols = axes[1],
        .part = picture->part,
        .strip = {.pixels = picture->pixels,
                  .stride = 3 * picture->part.width,
                  .pixels_top = picture->part.top,
                  .pixels_start = 3 * picture->part.left},
        .target =
            {
                .out = (unsigned char *)family->out + (b * family->views + v) * 3 * area * value,
                .row_bytes = family->width * pixel,
                .plane_bytes = area * value,
                .pixel_bytes = pixel,
                .value_bytes = value,
                .dtype = family->dtype,
                .channels_last = family->channels_last,
            },
    };
    memcpy(job.target.scale, family->scale, sizeof family->scale);
    memcpy(job.target.shift, family->shift, sizeof family->shift);
    const bool lines = ((uintptr_t)job.target.out | (uintptr_t)job.target.row_bytes) % LINE_BYTES == 0;
    job.target.streamed = plan->streams && lines && !family->channels_last && BUILT[plan->set].lanes * value == LINE_BYTES;
    /* on its side no row is finished before all are */
    job.staged = plan->streams && !job.target.streamed && (!job.on_its_side || record->sigma_px > 0);
    return job;
}

/* Lay a job's tables and intermediate values into memory; returns how many bytes they take. */
static size_t lay_out(wf_job *job, unsigned char *memory, int lanes)
{
    size_t used = 0;
    wf_axis *axes[2] = {&job->rows, &job->cols};
    for (int a = 0; a < 2; a++) {
        const int64_t samples = padded_to(axes[a]->samples, lanes);
        axes[a]->first = carve(memory, &used, samples, sizeof *axes[a]->first);
        axes[a]->weights = carve(memory, &used, samples * axes[a]->taps, sizeof *axes[a]->weights);
    }
    const int64_t box_cols = ceil_of(job->cols.stop - job->cols.start) + 2 * job->cols.taps + 2;
    const int64_t strip_cols = box_cols < job->cols.pixels ? box_cols : job->cols.pixels;
    job->strip.values = carve(memory, &used, (3 * strip_cols + (TOGETHER + 2) * lanes) * lanes, sizeof *job->strip.values);
    const int64_t block_rows = ceil_of((job->rows.stop - job->rows.start) / (double)job->rows.samples * lanes) + job->rows.taps + 2;
    const int64_t level_rows = block_rows < job->rows.pixels ? block_rows : job->rows.pixels;
    job->strip.levels = carve(memory, &used, level_rows * TOGETHER * lanes, sizeof *job->strip.levels);
    if (job->staged) {
        job->stage = job->target;
        job->stage.plane_bytes = lanes * job->target.row_bytes;
        job->stage.out = carve(memory, &used, (job->target.channels_last ? 1 : 3) * job->stage.plane_bytes, 1);
    }
    if (job->record->sigma_px > 0) {
        wf_blur *blur = &job->blur;
        blur->radius = ceil_of(3 * (double)job->record->sigma_px);
        blur->stride = padded_to(job->width, 2 * lanes);
        blur->planes = carve(memory, &used, 3 * job->height * blur->stride, sizeof *blur->planes);
        blur->lines = carve(memory, &used, 3 * (blur->stride + 2 * blur->radius), sizeof *blur->lines);
        blur->gaussian = carve(memory, &used, blur->radius + 1, sizeof *blur->gaussian);
        blur->mirrored_rows = carve(memory, &used, job->height + 2 * blur->radius, sizeof *blur->mirrored_rows);
    }
    return used;
}

static void fill_blur(wf_job *job)
{
    wf_blur *blur = &job->blur;
    const double sigma = job->record->sigma_px;
    double sum = 0;
    for (int64_t k = -blur->radius; k <= blur->radius; k++)
        sum += exp(-0.5 * ((double)k / sigma) * ((double)k / sigma));
    for (int64_t k = 0; k <= blur->radius; k++)
        blur->gaussian[k] = (float)(exp(-0.5 * ((double)k / sigma) * ((double)k / sigma)) / sum);
    for (int64_t row = -blur->radius; row < job->height + blur->radius; row++)
        blur->mirrored_rows[row + blur->radius] = mirrored(row, job->height) * blur->stride;
    blur->target = (wf_target){
        .out = (unsigned char *)blur->planes,
        .row_bytes = 4 * blur->stride,
        .plane_bytes = 4 * job->height * blur->stride,
        .pixel_bytes = 4,
        .value_bytes = 4,
        .dtype = WF_FLOAT32,
        .scale = {1, 1, 1},
    };
}

/* The pixels of an axis that its samples read, `low` to `high`, or a few more: all of them lie there, whatever rounding does to a place. */
static void find_reach(const wf_axis *axis, int64_t *low, int64_t *high)
{
    const double scale = (axis->stop - axis->start) / (double)axis->samples, reach = scale > 1 ? scale : 1;
    *low = clamped(floor_of(axis->start - reach) - 1, 0, axis->pixels - axis->taps);
    *high = clamped(ceil_of(axis->stop + reach) + 1, axis->taps, axis->pixels);
}

static bool check_side(int64_t position, int64_t height, int64_t width, char message[WF_MESSAGE_BYTES])
{
    const bool fine = height >= 1 && width >= 1 && height <= WF_LARGEST_SIDE_PX && width <= WF_LARGEST_SIDE_PX;
    if (!fine)
        snprintf(message, WF_MESSAGE_BYTES, "picture %lld has shape (%lld, %lld, 3): needs sides of 1 to %d", (long long)position,
                 (long long)height, (long long)width, WF_LARGEST_SIDE_PX);
    return fine;
}

wf_status wf_plan_needed(const wf_plan *plan, int64_t position, int64_t height, int64_t width, wf_part *needed,
                         char message[WF_MESSAGE_BYTES])
{
    *needed = (wf_part){0};
    if (!check_side(position, height, width, message))
        return WF_BAD_PICTURE;
    const wf_picture picture = {.height = height, .width = width};
    int64_t top = height, bottom = 0, left = width, right = 0;
    for (int f = 0; f < plan->families; f++)
        for (int64_t v = 0; v < plan->family[f].views; v++) {
            const wf_job job = make_job(plan, f, position, v, &picture);
            int64_t low, high;
            find_reach(&job.rows, &low, &high);
            top = low < top ? low : top;
            bottom = high > bottom ? high : bottom;
            find_reach(&job.cols, &low, &high);
            left = low < left ? low : left;
            right = high > right ? high : right;
        }
    if (top < bottom)
        *needed = (wf_part){.top = top, .left = left, .height = bottom - top, .width = right - left};
    return WF_DONE;
}

static bool within_side(int64_t start, int64_t length, int64_t side)
{
    return start >= 0 && length >= 1 && length <= side && start <= side - length;
}

wf_status wf_render_picture(const wf_plan *plan, int64_t position, const wf_picture *given, char message[WF_MESSAGE_BYTES])
{
    if (!check_side(position, given->height, given->width, message))
        return WF_BAD_PICTURE;
    wf_picture with_part = *given;
    const wf_picture *const picture = &with_part;
    wf_part *const part = &with_part.part;
    if (!part->top && !part->left && !part->height && !part->width)
        *part = (wf_part){.height = given->height, .width = given->width};
    if (!picture->pixels || !within_side(part->top, part->height, given->height) || !within_side(part->left, part->width, given->width)) {
        snprintf(message, WF_MESSAGE_BYTES, "picture %lld of %lld x %lld pixels: %s", (long long)position, (long long)given->height,
                 (long long)given->width, picture->pixels ? "the part that is there leaves it" : "none are there");
        return WF_BAD_PICTURE;
    }
    const int lanes = BUILT[plan->set].lanes;
    const bool narrow = 3 * part->width < lanes; /* no load fits into a row: render a copy with longer rows */
    const size_t copied = narrow ? (size_t)padded_to(part->height * lanes, LINE_BYTES) : 0;
    size_t needed = 0;
    for (int f = 0; f < plan->families; f++)
        for (int64_t v = 0; v < plan->family[f].views; v++) {
            wf_job job = make_job(plan, f, position, v, picture);
            const size_t bytes = lay_out(&job, NULL, lanes);
            needed = bytes > needed ? bytes : needed;
        }
    wf_scratch *scratch = wf_scratch_take(copied + needed + LINE_BYTES);
    if (!scratch) {
        snprintf(message, WF_MESSAGE_BYTES, "no memory to render picture %lld: %zu bytes", (long long)position, copied + needed);
        return WF_NO_MEMORY;
    }
    for (int64_t row = 0; narrow && row < part->height; row++) {
        memset(scratch->memory + row * lanes, 0, (size_t)lanes);
        memcpy(scratch->memory + row * lanes, picture->pixels + row * 3 * part->width, 3 * (size_t)part->width);
    }
    bool is_there = true;
    for (int f = 0; f < plan->families; f++)
        for (int64_t v = 0; is_there && v < plan->family[f].views; v++) {
            wf_job job = make_job(plan, f, position, v, picture);
            FORBID(scratch->memory + copied, scratch->bytes - copied);
            lay_out(&job, scratch->memory + copied, lanes);
            if (narrow) {
                job.strip.pixels = scratch->memory;
                job.strip.stride = lanes;
            }
            job.strip.last_load = 3 * part->left + (narrow ? 0 : 3 * part->width - lanes);
            if (job.record->sigma_px > 0)
                fill_blur(&job);
            is_there = BUILT[plan->set].render_view(&job);
        }
#if defined(__x86_64__)
    _mm_sfence(); /* what went past the cache is there before anyone hears that it is */
#endif
    wf_scratch_give(scratch);
    if (!is_there) {
        snprintf(message, WF_MESSAGE_BYTES, "picture %lld: its views read past the part that is there, %lld x %lld pixels at (%lld, %lld)",
                 (long long)position, (long long)part->height, (long long)part->width, (long long)part->left, (long long)part->top);
        return WF_BAD_PICTURE;
    }
    return WF_DONE;
}

typedef struct {
    const wf_plan *plan;
    const wf_picture *pictures;
    atomic_llong next;
    atomic_int failed; /* the first thread to set it owns status and message */
    wf_status status;
    char *message;
} wf_queue;

static void *work(void *shared)
{
    wf_queue *queue = shared;
    char message[WF_MESSAGE_BYTES];
    while (!atomic_load(&queue->failed)) {
        const int64_t position = atomic_fetch_add(&queue->next, 1);
        if (position >= queue->plan->pictures)
            break;
        const wf_status status = wf_render_picture(queue->plan, position, &queue->pictures[position], message);
        if (status != WF_DONE && !atomic_exchange(&queue->failed, 1)) {
            queue->status = status;
            memcpy(queue->message, message, sizeof message);
        }
    }
    return NULL;
}

wf_status wf_render_all(const wf_plan *plan, const wf_picture *pictures, int threads, char message[WF_MESSAGE_BYTES])
{
    enum { MOST_THREADS = 256 };
    wf_queue queue = {.plan = plan, .pictures = pictures, .status = WF_DONE, .message = message};
    const int64_t helpers = clamped((threads < plan->pictures ? threads : plan->pictures) - 1, 0, MOST_THREADS);
    pthread_t thread[MOST_THREADS];
    int started = 0;
    while (started < helpers && pthread_create(&thread[started], NULL, work, &queue) == 0)
        started++; /* where the system grants fewer, fewer do */
    work(&queue);
    for (int i = 0; i < started; i++)
        pthread_join(thread[i], NULL);
    return queue.status;
}
