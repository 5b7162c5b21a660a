/* A fuzzer for the CPU view kernel: batches sane, on the edge and hostile, in memory of exactly the size that is said.
 *
 * Here: cases drawn from a seed (or from a fuzzer's bytes), rendered by every instruction set; what must hold beside memory safety.
 * Not here: right pixels (test_render_views.py); what sees a wrong access (AddressSanitizer, UBSan, Valgrind: test_native_safety.py).
 * Usage: fuzz_render_views SPAN SEED [SETS [CASE [PLANT]]], SPAN as in "60s" or "400cases", SETS as in "baseline,avx2" or "all",
 * CASE the first; a span of "1cases" runs it alone.
 * Build: the kernel with -Dmalloc=scarce_malloc, for calloc, aligned_alloc and pthread_create alike, so that they can fail.
 */
#include "render_views_core.h"

#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined(SANITIZED)
#include <sanitizer/common_interface_defs.h>
#endif

/* One thing that is done wrong on purpose, and must be seen. */
static enum { NOTHING, OVERREAD, OVERRUN, UNSET, OVERFLOW, LEAK, UNWRITTEN, UNEQUAL, MOVED, OUT_OF_RANGE, MISJUDGED, PLANTS } planted;
static const char *const PLANT_NAMES[PLANTS] = {"nothing",   "overread", "overrun", "unset",        "overflow", "leak",
                                                "unwritten", "unequal",  "moved",   "out-of-range", "misjudged"};

enum { MOST_PICTURES = 3, MOST_FAMILIES = 2, MOST_VIEWS = 3, MOST_BLOCKS = 32, MOST_OFFSET = 16, LEAD = 0xc3 };

static const char *const SET_NAMES[WF_INSTRUCTION_SETS] = {"baseline", "avx2", "avx512"};

/* Numbers that decide a case: the fuzzer's bytes while they last, then splitmix64. */
typedef struct {
    const uint8_t *bytes;
    size_t left;
    uint64_t state;
} source;

/* Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. */
static uint64_t splitmix64(uint64_t *state)
{
    uint64_t mixed = *state += 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
    return mixed ^ mixed >> 31;
}

static uint32_t draw(source *choices)
{
    uint32_t number = (uint32_t)(splitmix64(&choices->state) >> 32);
    if (choices->left >= sizeof number) {
        memcpy(&number, choices->bytes, sizeof number);
        choices->bytes += sizeof number;
        choices->left -= sizeof number;
    }
    return number;
}

static int64_t between(source *choices, int64_t least, int64_t most)
{
    return least + (int64_t)(draw(choices) % (uint64_t)(most - least + 1));
}

static bool one_in(source *choices, int64_t n)
{
    return between(choices, 1, n) == n;
}

static float uniform(source *choices, float low, float high)
{
    return low + (high - low) * ((float)draw(choices) * 0x1p-32f);
}

static float any_float(source *choices)
{
    static const float NASTY[] = {NAN,      INFINITY, -INFINITY, 0.0f,    -0.0f,     1e-45f,  FLT_MIN,  FLT_MAX, -FLT_MAX, 1e-30f, 1e30f,
                                  -1e9f,    0x1p20f,  -0x1p20f,  0x1p24f, 0x1.8p20f, 0x1p31f, -0x1p31f, 0x1p63f, -0x1p63f, 255.0f, 256.0f,
                                  257.0f,   -1.0f,    0.5f,      1.0f,    1.5f,      3.0f,    1e-7f,    1e-3f,   16.0f,    300.0f,
                                  /* all bits but the sign */ __builtin_nanf("0x3fffff")};
    const uint32_t bits = draw(choices);
    float value;
    memcpy(&value, &bits, sizeof value);
    return one_in(choices, 4) ? value : NASTY[bits % (sizeof NASTY / sizeof *NASTY)];
}

static struct {
    uint64_t seed, number;
} this_case;

static void name_case(void)
{
    fprintf(stderr, "case %" PRIu64 " of seed %" PRIu64 "\n", this_case.number, this_case.seed);
}

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputs(": ", stderr);
    name_case();
    abort();
}

typedef struct {
    unsigned char *block[MOST_BLOCKS];
    int count;
} blocks;

static void *take(blocks *owner, size_t bytes)
{
    unsigned char *memory = malloc(bytes);
    if (owner->count == MOST_BLOCKS || (!memory && bytes))
        fail("the harness has no room for %zu bytes", bytes);
    owner->block[owner->count++] = memory;
    return memory;
}

static void release(blocks *owner)
{
    while (owner->count)
        free(owner->block[--owner->count]);
}

static atomic_int allocations_left = INT_MAX; /* until one fails, once */

static bool runs_out(void)
{
    return atomic_fetch_sub(&allocations_left, 1) == 1;
}

void *scarce_malloc(size_t bytes)
{
    return runs_out() ? NULL : malloc(bytes);
}

void *scarce_calloc(size_t count, size_t bytes)
{
    return runs_out() ? NULL : calloc(count, bytes);
}

void *scarce_aligned_alloc(size_t alignment, size_t bytes)
{
    return runs_out() ? NULL : aligned_alloc(alignment, bytes);
}

int scarce_pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*start)(void *), void *argument)
{
    return runs_out() ? EAGAIN : pthread_create(thread, how, start, argument);
}

typedef enum { ACCEPTED, REFUSED, EITHER } verdict;

/* What a caller hands over. `records` go away once the plan is made, `kept` afterwards. */
typedef struct {
    int64_t pictures;
    int families;
    wf_instruction_set set;
    uint8_t *orientation;
    wf_family family[MOST_FAMILIES];
    wf_picture picture[MOST_PICTURES];
    unsigned char *lead[MOST_FAMILIES]; /* up to where each family's out begins */
    size_t out_bytes[MOST_FAMILIES];
    blocks records, kept;
    verdict plan, render; /* what the kernel must say; render is asked of accepted plans */
    const char *spoilt;   /* what was done to it */
} batch;

/* What a batch costs: only one of pictures, views and blurs is large. */
typedef enum { ALL_SMALL, LARGE_PICTURE, LARGE_VIEW, LONG_VIEW, LARGE_BLUR } extent;

static size_t value_size(wf_dtype dtype)
{
    return dtype == WF_FLOAT32 ? 4 : dtype == WF_UINT8 ? 1 : 2;
}

static void draw_picture(source *choices, extent extent, batch *batch, wf_picture *picture)
{
    const int64_t most = extent == LARGE_PICTURE ? 600 : one_in(choices, 3) ? 80 : 24;
    picture->height = one_in(choices, 6) ? 1 : between(choices, 1, most);
    picture->width = one_in(choices, 6) ? 1 : between(choices, 1, most);
    if (extent == LARGE_PICTURE && one_in(choices, 2))
        *(one_in(choices, 2) ? &picture->height : &picture->width) = between(choices, 600, 3000);
    const size_t offset = one_in(choices, 2) ? 0 : (size_t)between(choices, 1, MOST_OFFSET);
    const size_t bytes = offset + (size_t)(3 * picture->height * picture->width) - (planted == OVERREAD);
    unsigned char *memory = take(&batch->kept, bytes);
    if (planted != UNSET)
        memset(memory, one_in(choices, 2) ? 255 : 0, bytes);
    for (size_t i = bytes / 4; i + sizeof(uint64_t) <= bytes; i += sizeof(uint64_t)) {
        const uint64_t levels = splitmix64(&choices->state);
        memcpy(memory + i, &levels, sizeof levels);
    }
    picture->pixels = memory + offset;
}

/* A stretch of an axis that must be accepted: inside, touching or leaving the picture, thin as can be, as far as may be. */
static void draw_stretch(source *choices, int64_t pixels, float *start, float *stop)
{
    const float side = (float)pixels, limit = WF_LARGEST_SIDE_PX;
    switch (between(choices, 0, 7)) {
    case 0:
        *start = 0, *stop = side;
        return;
    case 1:
        *start = (float)between(choices, 0, pixels - 1), *stop = (float)between(choices, (int64_t)*start + 1, pixels);
        return;
    case 2:
        *start = uniform(choices, 0, side), *stop = *start + uniform(choices, 0.001f, 1);
        return;
    case 3:
        *start = uniform(choices, -3 * side, 3 * side), *stop = *start + uniform(choices, 0.5f, 4 * side);
        return;
    case 4:
        *start = one_in(choices, 2) ? uniform(choices, -side, side) : uniform(choices, -limit, 0.9f * limit);
        *stop = nextafterf(*start, INFINITY);
        return;
    case 5:
        *start = one_in(choices, 2) ? -limit : uniform(choices, -limit, 0);
        *stop = one_in(choices, 2) ? limit : uniform(choices, 1, limit);
        return;
    default:
        *start = uniform(choices, 0, 0.9f * side), *stop = uniform(choices, *start + 0.01f * side, side);
    }
}

static float draw_sigma(source *choices, extent extent)
{
    if (extent == LARGE_BLUR)
        return one_in(choices, 4) ? WF_LARGEST_SIGMA_PX : uniform(choices, 3, WF_LARGEST_SIGMA_PX);
    if (one_in(choices, 2))
        return 0;
    if (one_in(choices, 5))
        return uniform(choices, 0, 1e-3f) * (one_in(choices, 2) ? 1 : FLT_MIN);
    return uniform(choices, 0.1f, 2.5f);
}

/* A color matrix, or one as far off as may be. */
static void draw_matrix(source *choices, float matrix[12])
{
    const bool strong = one_in(choices, 6);
    for (int k = 0; k < 12; k++)
        if (strong)
            matrix[k] = (float)between(choices, -1, 1) * WF_LARGEST_MATRIX_ENTRY;
        else
            matrix[k] = k % 4 == 3 ? uniform(choices, -300, 300) : uniform(choices, -2, 2);
}

static void draw_records(source *choices, extent extent, batch *batch, wf_family *family)
{
    const size_t records = (size_t)(batch->pictures * family->views);
    float *boxes = take(&batch->records, records * 4 * sizeof *boxes);
    uint8_t *flipped = take(&batch->records, records);
    int64_t *turns = take(&batch->records, records * sizeof *turns);
    float *matrix = one_in(choices, 2) ? take(&batch->records, records * 12 * sizeof *matrix) : NULL;
    float *sigma = one_in(choices, 2) ? take(&batch->records, records * sizeof *sigma) : NULL;
    uint8_t *solarized = one_in(choices, 2) ? take(&batch->records, records) : NULL;
    for (size_t at = 0; at < records; at++) {
        const size_t b = at / (size_t)family->views;
        const wf_picture *picture = &batch->picture[b];
        const bool lies = batch->orientation && batch->orientation[b] > 4;
        draw_stretch(choices, lies ? picture->height : picture->width, &boxes[4 * at], &boxes[4 * at + 2]);
        draw_stretch(choices, lies ? picture->width : picture->height, &boxes[4 * at + 1], &boxes[4 * at + 3]);
        flipped[at] = (uint8_t)between(choices, 0, one_in(choices, 8) ? 255 : 1);
        turns[at] = between(choices, 0, 3);
        if (matrix)
            draw_matrix(choices, matrix + 12 * at);
        if (sigma)
            sigma[at] = draw_sigma(choices, extent);
        if (solarized)
            solarized[at] = (uint8_t)between(choices, 0, one_in(choices, 8) ? 255 : 1);
    }
    family->boxes = boxes;
    family->flipped = flipped;
    family->quarter_turns = turns;
    family->matrix = matrix;
    family->blur_sigma_px = sigma;
    family->solarized = solarized;
}

static void draw_family(source *choices, extent extent, batch *batch, int f)
{
    wf_family *family = &batch->family[f];
    const int64_t most = extent == LARGE_VIEW ? 520 : one_in(choices, 4) ? 70 : 20;
    *family = (wf_family){
        .views = one_in(choices, 12) ? 0 : between(choices, 1, extent == ALL_SMALL ? MOST_VIEWS : 1),
        .height = between(choices, 1, most),
        .width = between(choices, 1, most),
        .dtype = (wf_dtype)between(choices, WF_UINT8, WF_FLOAT32),
        .channels_last = one_in(choices, 2),
        .centered = one_in(choices, 3),
        .scale = {1, 1, 1},
    };
    if (extent == LONG_VIEW) {
        const int64_t length = one_in(choices, 2) ? WF_LARGEST_VIEW_SIDE_PX : between(choices, 300, WF_LARGEST_VIEW_SIDE_PX);
        const bool tall = one_in(choices, 2);
        family->height = tall ? length : between(choices, 1, 3);
        family->width = tall ? between(choices, 1, 3) : length;
    }
    for (int c = 0; c < 3 && one_in(choices, 2); c++) {
        family->scale[c] = uniform(choices, -0.02f, 0.02f);
        family->shift[c] = uniform(choices, -3, 3);
    }
    draw_records(choices, extent, batch, family);

    const size_t value = value_size(family->dtype);
    const size_t bytes = (size_t)(batch->pictures * family->views * 3 * family->height * family->width) * value;
    const size_t offset = one_in(choices, 2) ? 0 : (size_t)between(choices, 1, MOST_OFFSET) * value;
    batch->lead[f] = take(&batch->kept, offset + bytes - (planted == OVERRUN && bytes));
    memset(batch->lead[f], LEAD, offset);
    batch->out_bytes[f] = bytes;
    family->out = batch->lead[f] + offset;
}

static bool set_is_chosen(const char *sets, wf_instruction_set set)
{
    return wf_has_instruction_set(set) && (strcmp(sets, "all") == 0 || strstr(sets, SET_NAMES[set]));
}

static void draw_batch(source *choices, const char *sets, extent extent, batch *batch)
{
    memset(batch, 0, sizeof *batch);
    batch->pictures = extent == ALL_SMALL ? between(choices, one_in(choices, 12) ? 0 : 1, MOST_PICTURES) : 1;
    batch->families = (int)between(choices, one_in(choices, 20) ? 0 : 1, MOST_FAMILIES);
    do
        batch->set = (wf_instruction_set)between(choices, 0, WF_INSTRUCTION_SETS - 1);
    while (!set_is_chosen(sets, batch->set));
    if (one_in(choices, 2))
        batch->orientation = take(&batch->records, (size_t)batch->pictures);
    for (int64_t b = 0; b < batch->pictures; b++) {
        if (batch->orientation)
            batch->orientation[b] = (uint8_t)between(choices, 1, 8);
        draw_picture(choices, extent, batch, &batch->picture[b]);
    }
    for (int f = 0; f < batch->families; f++)
        draw_family(choices, extent, batch, f);
}

/* A whole number below 0 or above the largest that is right; those past 32 bits would be right if they were cut off. */
static int64_t bad_whole(source *choices, int64_t largest)
{
    const int64_t BAD[] = {-1, largest + 1, 256, INT32_MIN, (int64_t)1 << 32, ((int64_t)1 << 32) + 1, INT64_MAX, INT64_MIN};
    const int64_t bad = BAD[between(choices, 0, 7)];
    return bad < 0 || bad > largest ? bad : largest + 1;
}

static int64_t bad_side(source *choices, int64_t largest)
{
    return one_in(choices, 4) ? 0 : bad_whole(choices, largest);
}

static float bad_number(source *choices, float largest)
{
    const float BAD[] = {NAN, INFINITY, nextafterf(largest, INFINITY), FLT_MAX, 0x1p31f, 0x1p63f};
    return BAD[between(choices, 0, 5)] * (one_in(choices, 2) ? 1 : -1);
}

/* Make one thing of a batch's records wrong, so that no plan may come of it; a batch that lacks the thing stays as it is. */
static void spoil(source *choices, batch *batch)
{
    wf_family *first = &batch->family[0], *family = &batch->family[between(choices, 0, MOST_FAMILIES - 1)];
    const int64_t records = batch->pictures * family->views; /* 0 also for a family that is not there */
    const int64_t at = records ? between(choices, 0, records - 1) : 0;
    const int axis = (int)between(choices, 0, 1);
    float *box = (float *)family->boxes + 4 * at; /* the harness's own, const to the kernel only */
    const char *what = NULL;
    switch (between(choices, 0, 12)) {
    case 0:
        what = "a negative number of pictures";
        batch->pictures = one_in(choices, 2) ? -1 : INT64_MIN;
        break;
    case 1:
        what = "a negative number of families";
        batch->families = one_in(choices, 2) ? -1 : INT32_MIN;
        break;
    case 2:
        what = "an instruction set that is not";
        batch->set = (wf_instruction_set)(one_in(choices, 2) ? WF_INSTRUCTION_SETS : 1 << 20);
        break;
    case 3:
        if (batch->families) {
            what = "a view's side";
            *(axis ? &first->height : &first->width) = bad_side(choices, WF_LARGEST_VIEW_SIDE_PX);
        }
        break;
    case 4:
        if (batch->families) {
            what = "a negative number of views";
            first->views = one_in(choices, 2) ? -1 : INT64_MIN;
        }
        break;
    case 5:
        if (batch->families && batch->pictures) {
            what = "more views than memory can be addressed";
            first->views = INT64_MAX >> between(choices, 0, 2);
        }
        break;
    case 6:
        if (batch->families) {
            what = "a dtype that is not";
            first->dtype = (wf_dtype)(one_in(choices, 2) ? WF_FLOAT32 + 1 : 255);
        }
        break;
    case 7:
        if (batch->families && batch->pictures && batch->orientation) {
            what = "an orientation";
            const int64_t bad = one_in(choices, 2) ? 9 * axis : between(choices, 9, 255);
            batch->orientation[between(choices, 0, batch->pictures - 1)] = (uint8_t)bad;
        }
        break;
    case 8:
        if (records) {
            what = "a box's number";
            box[between(choices, 0, 3)] = bad_number(choices, WF_LARGEST_SIDE_PX);
        }
        break;
    case 9:
        if (records) {
            what = "a box without inside";
            box[axis + 2] = one_in(choices, 2) ? box[axis] : nextafterf(box[axis], -INFINITY);
        }
        break;
    case 10:
        if (records) {
            what = "quarter turns";
            ((int64_t *)family->quarter_turns)[at] = bad_whole(choices, 3);
        }
        break;
    case 11:
        if (records && family->blur_sigma_px) {
            what = "a blur";
            ((float *)family->blur_sigma_px)[at] = one_in(choices, 3) ? -1e-30f : bad_number(choices, WF_LARGEST_SIGMA_PX);
        }
        break;
    case 12:
        if (records && family->matrix) {
            what = "a matrix";
            ((float *)family->matrix)[12 * at + between(choices, 0, 11)] = bad_number(choices, WF_LARGEST_MATRIX_ENTRY);
        }
        break;
    }
    batch->spoilt = what;
    batch->plan = what ? REFUSED : ACCEPTED;
}

/* Make a picture wrong: a plan is made, but not rendered. */
static void spoil_picture(source *choices, batch *batch)
{
    if (!batch->pictures)
        return;
    wf_picture *picture = &batch->picture[between(choices, 0, batch->pictures - 1)];
    if (one_in(choices, 4))
        picture->pixels = NULL;
    else if (one_in(choices, 2)) {
        int64_t *side[] = {&picture->part.top, &picture->part.left, &picture->part.height, &picture->part.width};
        picture->part = (wf_part){.height = picture->height, .width = picture->width};
        *side[between(choices, 0, 3)] += one_in(choices, 2) ? between(choices, 1, 9) : INT64_MAX / 2;
    } else
        *(one_in(choices, 2) ? &picture->height : &picture->width) = bad_side(choices, WF_LARGEST_SIDE_PX);
    batch->spoilt = "a picture";
    batch->render = REFUSED;
}

/* Put anything anywhere: it may be refused or not. */
static void litter(source *choices, batch *batch)
{
    batch->plan = EITHER;
    batch->spoilt = "litter";
    const int64_t often = one_in(choices, 3) ? 2 : 20;
    for (int f = 0; f < batch->families; f++) {
        wf_family *family = &batch->family[f];
        const int64_t records = batch->pictures * family->views;
        for (int64_t at = 0; at < records; at++) {
            for (int k = 0; k < 4; k++)
                if (one_in(choices, often))
                    ((float *)family->boxes)[4 * at + k] = any_float(choices);
            for (int k = 0; family->matrix && k < 12; k++)
                if (one_in(choices, often))
                    ((float *)family->matrix)[12 * at + k] = any_float(choices);
            if (family->blur_sigma_px && one_in(choices, often) && family->height * family->width < 1000)
                ((float *)family->blur_sigma_px)[at] = any_float(choices);
            if (one_in(choices, often))
                ((int64_t *)family->quarter_turns)[at] = between(choices, -1, 4);
        }
        for (int c = 0; c < 3; c++) {
            if (one_in(choices, often))
                family->scale[c] = any_float(choices);
            if (one_in(choices, often))
                family->shift[c] = any_float(choices);
        }
    }
}

static void check_message(const batch *batch, const char *message)
{
    const char *end = memchr(message, 0, WF_MESSAGE_BYTES);
    if (!end || end == message)
        fail("%s is refused without a message", batch->spoilt ? batch->spoilt : "a batch");
    for (const char *at = message; at < end; at++)
        if (*at < ' ' || *at > '~')
            fail("a message holds character %d", *at);
}

static float half_to_float(uint16_t half)
{
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
                                      : ldexpf((float)fraction, -24);
    return half & 0x8000 ? -size : size;
}

static float value_at(const wf_family *family, int64_t i)
{
    if (family->dtype == WF_UINT8)
        return ((const uint8_t *)family->out)[i];
    if (family->dtype == WF_FLOAT32)
        return ((const float *)family->out)[i];
    const uint16_t half = ((const uint16_t *)family->out)[i];
    if (family->dtype == WF_FLOAT16)
        return half_to_float(half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Every value is a level from 0 to 255, normalized and rounded to its dtype; asked where no dtype overflows. */
static void check_range(const batch *batch, int f)
{
    const wf_family *family = &batch->family[f];
    const float rounding = family->dtype == WF_BFLOAT16 ? 0x1p-8f : family->dtype == WF_FLOAT16 ? 0x1p-10f : 0x1p-20f;
    float low[3], high[3];
    for (int c = 0; c < 3; c++) {
        const float dark = family->shift[c], light = 255 * family->scale[c] + family->shift[c];
        const float size = fabsf(family->shift[c]) + 255 * fabsf(family->scale[c]);
        if (!(size < 6e4f))
            return;
        const float slack = 0.01f * fabsf(family->scale[c]) + rounding * size + 1e-7f;
        low[c] = fminf(dark, light) - slack;
        high[c] = fmaxf(dark, light) + slack;
    }
    const int64_t area = family->height * family->width, values = (int64_t)(batch->out_bytes[f] / value_size(family->dtype));
    for (int64_t i = 0; i < values && family->dtype != WF_UINT8; i++) {
        const int64_t channel = family->channels_last ? i % 3 : i / area % 3;
        const float value = value_at(family, i);
        if (!(value >= low[channel] && value <= high[channel]))
            fail("value %" PRId64 " of family %d is %g, outside %g to %g", i, f, (double)value, (double)low[channel],
                 (double)high[channel]);
    }
}

static void poison(const batch *batch, int poison)
{
    for (int f = 0; f < batch->families; f++)
        if (batch->out_bytes[f])
            memset(batch->family[f].out, poison, batch->out_bytes[f] - (planted == OVERRUN));
}

static struct {
    int64_t cases, rendered[WF_INSTRUCTION_SETS], refused, pictures_refused, parts, parts_refused, starved;
} counts;

/* Copy a part of a picture into memory of its own. */
static wf_picture cut_out(const wf_picture *whole, wf_part part, blocks *owner)
{
    unsigned char *pixels = take(owner, (size_t)(3 * part.height * part.width));
    const int64_t aside = planted == MOVED && part.left > 0;
    for (int64_t row = 0; row < part.height; row++)
        memcpy(pixels + 3 * row * part.width, whole->pixels + 3 * ((part.top + row) * whole->width + part.left - aside),
               (size_t)(3 * part.width));
    return (wf_picture){.pixels = pixels, .height = whole->height, .width = whole->width, .part = part};
}

/* Move the sides of what the views read outwards, or one of them inwards. */
static wf_part draw_part(source *choices, const wf_picture *whole, wf_part needed, bool smaller)
{
    int64_t low[2] = {needed.top, needed.left}, high[2] = {needed.top + needed.height, needed.left + needed.width};
    const int64_t side[2] = {whole->height, whole->width}, cut = between(choices, 0, 3);
    for (int axis = 0; axis < 2; axis++) {
        const int64_t less = low[axis] - between(choices, 0, 5), more = high[axis] + between(choices, 0, 5);
        low[axis] = less > 0 && !smaller ? less : smaller ? low[axis] : 0;
        high[axis] = smaller ? high[axis] : more < side[axis] ? more : side[axis];
    }
    if (smaller && high[cut / 2] - low[cut / 2] > 1) {
        const int64_t by = between(choices, 1, high[cut / 2] - low[cut / 2] - 1);
        *(cut % 2 ? &low[cut / 2] : &high[cut / 2]) += cut % 2 ? by : -by;
    }
    return (wf_part){.top = low[0], .left = low[1], .height = high[0] - low[0], .width = high[1] - low[1]};
}

/* From a part that holds what they read, views are those of the whole; from a smaller one they are the same, or refused. */
static void check_parts(source *choices, const batch *batch, const wf_plan *plan, const blocks *once, char *message)
{
    for (int64_t b = 0; b < batch->pictures; b++) {
        const bool smaller = one_in(choices, 3);
        const wf_picture *whole = &batch->picture[b];
        wf_part needed;
        if (wf_plan_needed(plan, b, whole->height, whole->width, &needed, message) != WF_DONE)
            fail("no part of picture %" PRId64 " is named: %s", b, message);
        if (!needed.height)
            continue;
        blocks cut = {0};
        const wf_picture part = cut_out(whole, draw_part(choices, whole, needed, smaller), &cut);
        const wf_status status = wf_render_picture(plan, b, &part, message);
        if (status != WF_DONE && !(smaller && status == WF_BAD_PICTURE))
            fail("a part of picture %" PRId64 " ends with status %d: %s", b, (int)status, message);
        for (int f = 0; f < batch->families && status == WF_DONE; f++) {
            const size_t bytes = batch->out_bytes[f] / (size_t)batch->pictures, at = bytes * (size_t)b;
            if (memcmp((unsigned char *)batch->family[f].out + at, once->block[f] + at, bytes))
                fail("family %d of a part of picture %" PRId64 " is not that of the whole", f, b);
        }
        counts.parts += status == WF_DONE;
        counts.parts_refused += status != WF_DONE;
        release(&cut);
    }
}

/* All views are written, with the same bits once more in another way, and nothing before them is. */
static void check_render(source *choices, batch *batch, const wf_plan *plan, char *message)
{
    enum { FIRST = 0xa5, SECOND = 0x5a };
    poison(batch, FIRST);
    if (wf_render_all(plan, batch->picture, 1, message) != WF_DONE)
        fail("a batch is accepted and then refused: %s", message);
    blocks once = {0};
    for (int f = 0; f < batch->families; f++)
        memcpy(take(&once, batch->out_bytes[f]), batch->family[f].out, batch->out_bytes[f]);
    poison(batch, SECOND);
    if (one_in(choices, 3)) {
        for (int64_t b = batch->pictures; b-- > 0;)
            if (wf_render_picture(plan, b, &batch->picture[b], message) != WF_DONE)
                fail("picture %" PRId64 " is accepted among others and refused alone: %s", b, message);
    } else if (wf_render_all(plan, batch->picture, (int)between(choices, 2, 3), message) != WF_DONE) {
        fail("a batch is refused in several threads: %s", message);
    }
    for (int f = 0; f < batch->families; f++) {
        unsigned char *out = batch->family[f].out;
        if (planted == UNEQUAL && batch->out_bytes[f])
            out[batch->out_bytes[f] / 2] ^= 1;
        if (planted == OUT_OF_RANGE && batch->out_bytes[f] && batch->family[f].dtype == WF_FLOAT32)
            ((float *)out)[0] = ((float *)once.block[f])[0] = NAN;
        if (planted == UNWRITTEN && batch->out_bytes[f])
            once.block[f][0] = FIRST, out[0] = SECOND;
        for (size_t i = 0; i < batch->out_bytes[f]; i++) {
            if (once.block[f][i] == FIRST && out[i] == SECOND)
                fail("byte %zu of family %d is not written", i, f);
            if (once.block[f][i] != out[i])
                fail("byte %zu of family %d is %d and then %d", i, f, once.block[f][i], out[i]);
        }
        for (const unsigned char *at = batch->lead[f]; at < out; at++)
            if (*at != LEAD)
                fail("family %d is written to before its beginning", f);
        check_range(batch, f);
    }
    check_parts(choices, batch, plan, &once, message);
    release(&once);
}

/* Plan and render while one allocation or thread fails, the first or a later one; true if a plan came of it. */
static bool starve(source *choices, const batch *batch, wf_plan **plan, char *message)
{
    const int threads = (int)between(choices, 1, 3);
    allocations_left = (int)between(choices, 1, 12);
    wf_status status = wf_plan_make(plan, batch->pictures, batch->orientation, batch->families, batch->family, batch->set, message);
    if (status == WF_DONE)
        status = wf_render_all(*plan, batch->picture, threads, message);
    counts.starved += allocations_left < 1;
    if (status != WF_DONE && (status != WF_NO_MEMORY || allocations_left > 0))
        fail("a batch ends with status %d when memory runs out", (int)status);
    if (status == WF_NO_MEMORY)
        check_message(batch, message);
    allocations_left = INT_MAX;
    return *plan;
}

static void run_case(source *choices, const char *sets)
{
    batch batch;
    if (planted == OVERFLOW)
        counts.cases += INT64_MAX;
    draw_batch(choices, sets, one_in(choices, 12) ? (extent)between(choices, LARGE_PICTURE, LARGE_BLUR) : ALL_SMALL, &batch);
    if (one_in(choices, 3))
        spoil(choices, &batch);
    else if (one_in(choices, 20))
        spoil_picture(choices, &batch);
    else if (one_in(choices, 4))
        litter(choices, &batch);
    const verdict wanted = planted == MISJUDGED ? REFUSED : batch.plan;

    char *message = take(&batch.kept, WF_MESSAGE_BYTES);
    memset(message, LEAD, WF_MESSAGE_BYTES);
    wf_plan *plan = NULL;
    const bool starved = batch.plan == ACCEPTED && batch.render == ACCEPTED && one_in(choices, 8);
    if (!starved || !starve(choices, &batch, &plan, message)) {
        memset(message, LEAD, WF_MESSAGE_BYTES);
        const wf_status status =
            wf_plan_make(&plan, batch.pictures, batch.orientation, batch.families, batch.family, batch.set, message);
        if (status != (plan ? WF_DONE : WF_BAD_RECORD))
            fail("making %s plan ends with status %d", plan ? "a" : "no", (int)status);
    }
    release(&batch.records); /* a plan keeps its own copy */
    counts.cases++;
    if (plan ? wanted == REFUSED : wanted == ACCEPTED)
        fail("%s is %s", batch.spoilt ? batch.spoilt : "a sane batch", plan ? "accepted" : message);
    if (!plan) {
        check_message(&batch, message);
        counts.refused++;
    } else if (batch.render == REFUSED) {
        const wf_status status = wf_render_all(plan, batch.picture, (int)between(choices, 1, 3), message);
        if (status != WF_BAD_PICTURE)
            fail("%s is rendered with status %d", batch.spoilt, (int)status);
        check_message(&batch, message);
        counts.pictures_refused++;
    } else {
        if (wf_plan_pictures(plan) != batch.pictures)
            fail("a plan for %" PRId64 " pictures says %" PRId64, batch.pictures, wf_plan_pictures(plan));
        check_render(choices, &batch, plan, message);
        counts.rendered[batch.set]++;
    }
    if (planted != LEAK)
        wf_plan_free(plan);
    release(&batch.kept);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    run_case(&(source){.bytes = bytes, .left = size}, "all");
    return 0;
}

#ifndef LIBFUZZER
static void run_numbered(uint64_t seed, uint64_t number, const char *sets)
{
    this_case.seed = seed;
    this_case.number = number;
    source choices = {.state = seed};
    choices.state = splitmix64(&choices.state) ^ number;
    run_case(&choices, sets);
}

/* Fails if an instruction set that was asked for drew no view, or nothing was refused: then nothing was shown. */
int main(int arguments, char **argument)
{
    if (arguments < 3 || arguments > 6) {
        fprintf(stderr, "usage: %s SPAN SEED [SETS [CASE [PLANT]]], e.g. 60s 1 baseline,avx2 or 400cases 1\n", argument[0]);
        return 2;
    }
    char *unit;
    const double span = strtod(argument[1], &unit);
    const bool by_cases = strcmp(unit, "cases") == 0;
    if (unit == argument[1] || (!by_cases && strcmp(unit, "s") != 0)) {
        fprintf(stderr, "%s: no span; give seconds, as in 60s, or cases, as in 400cases\n", argument[1]);
        return 2;
    }
    const uint64_t seed = strtoull(argument[2], NULL, 10);
    const char *sets = arguments > 3 ? argument[3] : "all";
    uint64_t number = arguments > 4 ? strtoull(argument[4], NULL, 10) : 0;
    for (int plant = 0; arguments > 5 && plant < PLANTS; plant++)
        if (strcmp(argument[5], PLANT_NAMES[plant]) == 0)
            planted = plant;
    int chosen = 0;
    for (int set = 0; set < WF_INSTRUCTION_SETS; set++)
        chosen += set_is_chosen(sets, (wf_instruction_set)set);
    if (!chosen) {
        fprintf(stderr, "%s: this processor has none of these instruction sets\n", sets);
        return 2;
    }
#if defined(SANITIZED)
    __sanitizer_set_death_callback(name_case);
#endif
    const time_t start = time(NULL);
    do
        run_numbered(seed, number++, sets);
    while ((by_cases ? (double)counts.cases : difftime(time(NULL), start)) < span);

    bool shown = counts.refused && counts.pictures_refused && counts.parts && counts.parts_refused && counts.starved;
    printf("%" PRId64 " cases:", counts.cases);
    for (int set = 0; set < WF_INSTRUCTION_SETS; set++)
        if (set_is_chosen(sets, (wf_instruction_set)set)) {
            printf(" %" PRId64 " rendered by %s,", counts.rendered[set], SET_NAMES[set]);
            shown = shown && counts.rendered[set];
        }
    printf(" %" PRId64 " refused, %" PRId64 " with a refused picture, %" PRId64 " with a part of one, %" PRId64
           " with too small a part, %" PRId64 " short of memory\n",
           counts.refused, counts.pictures_refused, counts.parts, counts.parts_refused, counts.starved);
    return shown || (by_cases && span <= 1) ? 0 : 1;
}
#endif
