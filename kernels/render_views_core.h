/* The CPU view kernel: decoded pictures and their records in, finished views out. Plain C11, no Python.
 *
 * Here: what a caller sees. A plan is checked and copied once; then every read and write of a rendering lies inside the picture that is
 * handed over and the memory that the plan's families name, whatever the record holds and whatever the picture's size.
 * Not here: the definition (render_views_reference.py), the Python module (render_views_native.c).
 */
#ifndef WHEREFROM_RENDER_VIEWS_CORE_H
#define WHEREFROM_RENDER_VIEWS_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    WF_LARGEST_SIDE_PX = 1 << 20,      /* of a picture; and how far from its corner a box may lie */
    WF_LARGEST_VIEW_SIDE_PX = 1 << 13,
    WF_LARGEST_SIGMA_PX = 256,
    WF_LARGEST_MATRIX_ENTRY = 1 << 20,
    WF_MESSAGE_BYTES = 200,
};

typedef enum { WF_UINT8, WF_FLOAT16, WF_BFLOAT16, WF_FLOAT32 } wf_dtype;

typedef enum { WF_BASELINE, WF_AVX2, WF_AVX512, WF_INSTRUCTION_SETS } wf_instruction_set; /* baseline: SSE2, NEON, or plain C */

typedef enum { WF_DONE, WF_BAD_RECORD, WF_BAD_PICTURE, WF_NO_MEMORY, WF_CLOSED } wf_status;

/* One family of views, B pictures by V views, as the caller has it; a pointer that may be NULL says so. */
typedef struct {
    int64_t views;                /* V */
    int64_t height, width;        /* of the finished view, pixels */
    wf_dtype dtype;
    bool channels_last;
    bool centered;                 /* the filter: moment-corrected weights */
    const float *boxes;           /* (B, V, 4) xyxy in the upright picture, pixels */
    const uint8_t *flipped;       /* (B, V) */
    const int64_t *quarter_turns; /* (B, V) 0 to 3, counter-clockwise, after the mirror */
    const float *matrix;          /* (B, V, 3, 4) or NULL */
    const float *blur_sigma_px;   /* (B, V) or NULL */
    const uint8_t *solarized;     /* (B, V) or NULL */
    float scale[3], shift[3];     /* normalization: level * scale + shift, by channel */
    void *out;                    /* (B, V, 3, height, width), or (B, V, height, width, 3) if channels_last */
} wf_family;

/* A rectangle of a picture as stored, in pixels. */
typedef struct {
    int64_t top, left, height, width;
} wf_part;

/* A decoded picture as stored, its EXIF orientation not undone: height * width * 3 bytes of RGB, or those of a part of it. */
typedef struct {
    const uint8_t *pixels;
    int64_t height, width; /* of the whole picture */
    wf_part part;          /* what of it lies at `pixels`; {0}: all */
} wf_picture;

typedef struct wf_plan wf_plan;

/* The fastest instruction set of this processor; the baseline is always there. */
wf_instruction_set wf_best_instruction_set(void);
bool wf_has_instruction_set(wf_instruction_set set);

/* Check and copy a batch's records. `orientation` (B,) is EXIF's 1 to 8, NULL for upright pictures. What `out` points to is only written,
 * and must live as long as the plan. On failure *plan is NULL and `message` says in one line what was wrong. */
wf_status wf_plan_make(wf_plan **plan, int64_t pictures, const uint8_t *orientation, int families, const wf_family *family,
                       wf_instruction_set set, char message[WF_MESSAGE_BYTES]);
void wf_plan_free(wf_plan *plan);
int64_t wf_plan_pictures(const wf_plan *plan);

/* The least part of picture number `position`, height x width as stored, that all its views can be made from; {0} if it has no views. */
wf_status wf_plan_needed(const wf_plan *plan, int64_t position, int64_t height, int64_t width, wf_part *needed,
                         char message[WF_MESSAGE_BYTES]);

/* Write all views of the plan's picture number `position`, 0 <= position < B. Safe from many threads at once. WF_BAD_PICTURE, with views
 * undefined, if only a part of the picture is there and does not hold what they read. */
wf_status wf_render_picture(const wf_plan *plan, int64_t position, const wf_picture *picture, char message[WF_MESSAGE_BYTES]);

/* Memory of at least `bytes`, kept for the next that asks once it is given back; NULL if there is none. Safe from many threads at once. */
typedef struct wf_scratch wf_scratch;
wf_scratch *wf_scratch_take(size_t bytes);
unsigned char *wf_scratch_memory(wf_scratch *scratch);
void wf_scratch_give(wf_scratch *scratch);

/* Write all views of all B pictures, in `threads` threads, the caller's among them. */
wf_status wf_render_all(const wf_plan *plan, const wf_picture *pictures, int threads, char message[WF_MESSAGE_BYTES]);

#endif
