/* Decoding a part of a JPEG by a libjpeg-turbo that is in the process already, such as the one that Pillow brings. Plain C11, no Python.
 *
 * Here: what a caller sees. A part is exact: its pixels are those that the same library gives of the whole picture, bit for bit.
 * Not here: which pictures may be decoded in part (only the whole tells whether a file is damaged), the views (render_views_core.c).
 */
#ifndef WHEREFROM_DECODE_REGION_H
#define WHEREFROM_DECODE_REGION_H

#include <stddef.h>
#include <stdint.h>

#include "render_views_core.h"

typedef struct wf_jpeg wf_jpeg;

/* Look up libjpeg-turbo's functions in the shared object at `path` and what it was linked with, and ask the library whether its structures
 * are those that are known here. On failure *jpeg is NULL and `message` says in one line what was wrong. */
wf_status wf_jpeg_open(wf_jpeg **jpeg, const char *path, char message[WF_MESSAGE_BYTES]);
void wf_jpeg_close(wf_jpeg *jpeg);

/* The most bytes that a decoded part may take that holds `needed`; from 0 to WF_LARGEST_SIDE_PX on every side. */
size_t wf_jpeg_part_bytes(const wf_part *needed);

/* Decode what holds `needed`, of a file whose picture is height x width as stored, into memory of wf_jpeg_part_bytes; *part says where it
 * lies, in rows without gaps. WF_BAD_PICTURE if anything is not as in a file that can be decoded in part: one scan, gray or three colors,
 * this size, no damage as far as it is read. */
wf_status wf_jpeg_decode(const wf_jpeg *jpeg, const uint8_t *encoded, size_t bytes, int64_t height, int64_t width, const wf_part *needed,
                         uint8_t *pixels, wf_part *part, char message[WF_MESSAGE_BYTES]);

#endif
