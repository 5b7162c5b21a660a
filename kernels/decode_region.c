/* Decoding a part of a JPEG by libjpeg-turbo's own calls: columns by jpeg_crop_scanline, the rows above by jpeg_skip_scanlines, and none
 * of the rows below.
 *
 * No header of the library is needed to build this: the beginnings of its structures are declared here as its ABI has them, and the
 * library compares version and size of the largest of them itself. Whatever it complains of ends the decoding, a warning too.
 * Source: the application interface of libjpeg 6b and 8 as libjpeg-turbo 1.5 to 3.2 keeps it (libjpeg.txt).
 */
#include "decode_region.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EDGE_PX 2       /* at the edge of a part its pixels differ: chroma is interpolated as at the edge of a picture */
#define LARGEST_MCU_PX 32 /* parts begin at a multiple of a unit's width, 4 blocks of 8 at most */
#define ROWS_AT_ONCE 4

typedef struct decompress decompress;

/* struct jpeg_error_mgr */
typedef struct {
    void (*error_exit)(decompress *);
    void (*emit_message)(decompress *, int level);
    void (*output_message)(decompress *);
    void (*format_message)(decompress *, char *);
    void (*reset_error_mgr)(decompress *);
    int msg_code;
    union {
        int i[8];
        char s[80];
    } msg_parm;
    int trace_level;
    long num_warnings;
    const char *const *jpeg_message_table;
    int last_jpeg_message;
    const char *const *addon_message_table;
    int first_addon_message, last_addon_message;
} error_manager;

/* struct jpeg_source_mgr */
typedef struct {
    const uint8_t *next_input_byte;
    size_t bytes_in_buffer;
    void (*init_source)(decompress *);
    int (*fill_input_buffer)(decompress *);
    void (*skip_input_data)(decompress *, long);
    int (*resync_to_restart)(decompress *, int);
    void (*term_source)(decompress *);
} source_manager;

/* struct jpeg_decompress_struct as far as all versions agree and something here is asked of it */
struct decompress {
    error_manager *err;
    void *mem, *progress, *client_data;
    int is_decompressor, global_state;
    source_manager *src;
    unsigned int image_width, image_height;
    int num_components, jpeg_color_space, out_color_space;
    unsigned int scale_num, scale_denom;
    double output_gamma;
    int buffered_image, raw_data_out, dct_method, do_fancy_upsampling, do_block_smoothing, quantize_colors, dither_mode, two_pass_quantize;
    int desired_number_of_colors, enable_1pass_quant, enable_external_quant, enable_2pass_quant;
    unsigned int output_width, output_height;
    int out_color_components, output_components, rec_outbuf_height, actual_number_of_colors;
    uint8_t **colormap;
    unsigned int output_scanline;
};

enum { GRAY = 1, RGB = 2, YCBCR = 3 }; /* of J_COLOR_SPACE */

/* What a library of each version takes its structure to be, where pointers and sizes are 64 bits. */
static const struct {
    int version;
    size_t bytes;
} ABIS[] = {{62, 632}, {80, 656}};

enum { LARGEST_STRUCT = 1024 };

struct wf_jpeg {
    int version;
    size_t bytes;
    void (*create)(decompress *, int version, size_t bytes);
    int (*read_header)(decompress *, int require_image);
    int (*has_multiple_scans)(decompress *);
    int (*start)(decompress *);
    void (*crop)(decompress *, unsigned int *left, unsigned int *width);
    unsigned int (*skip)(decompress *, unsigned int rows);
    unsigned int (*read)(decompress *, uint8_t **rows, unsigned int count);
    void (*destroy)(decompress *);
};

/* One decoding: the library's structure, and what it calls back with. */
typedef struct {
    union {
        decompress info;
        unsigned char whole[LARGEST_STRUCT];
    } library;
    error_manager err;
    source_manager src;
    jmp_buf complained;
    char *message;
} decoding;

static decoding *decoding_of(decompress *info)
{
    return info->client_data;
}

static void __attribute__((noreturn, format(printf, 2, 3))) complain(decoding *work, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(work->message, WF_MESSAGE_BYTES, format, arguments);
    va_end(arguments);
    longjmp(work->complained, 1);
}

static void on_error(decompress *info)
{
    complain(decoding_of(info), "libjpeg-turbo says error %d", info->err->msg_code);
}

static void on_message(decompress *info, int level)
{
    if (level < 0) /* a warning; from 0 on it is chatter */
        complain(decoding_of(info), "libjpeg-turbo warns, %d", info->err->msg_code);
}

static void nothing(decompress *info)
{
    (void)info;
}

static void no_text(decompress *info, char *text)
{
    (void)info;
    *text = 0;
}

static int on_end(decompress *info)
{
    complain(decoding_of(info), "the file ends before its picture");
}

static void skip_input(decompress *info, long count)
{
    if (count <= 0)
        return;
    if ((size_t)count > info->src->bytes_in_buffer)
        on_end(info);
    info->src->next_input_byte += count;
    info->src->bytes_in_buffer -= (size_t)count;
}

static int on_lost_marker(decompress *info, int wanted)
{
    complain(decoding_of(info), "restart marker %d is not where it belongs", wanted);
}

static void prepare(decoding *work, const uint8_t *encoded, size_t bytes, char *message)
{
    memset(work, 0, sizeof *work);
    work->message = message;
    work->err = (error_manager){
        .error_exit = on_error,
        .emit_message = on_message,
        .output_message = nothing,
        .format_message = no_text,
        .reset_error_mgr = nothing,
    };
    work->src = (source_manager){
        .next_input_byte = encoded,
        .bytes_in_buffer = bytes,
        .init_source = nothing,
        .fill_input_buffer = on_end,
        .skip_input_data = skip_input,
        .resync_to_restart = on_lost_marker,
        .term_source = nothing,
    };
    work->library.info.err = &work->err;
    work->library.info.client_data = work; /* kept by jpeg_CreateDecompress */
}

/* Return whether the library takes a structure of this version and size for its own. */
static bool is_known(const wf_jpeg *jpeg, char message[WF_MESSAGE_BYTES])
{
    decoding work;
    prepare(&work, NULL, 0, message);
    if (setjmp(work.complained))
        return false;
    jpeg->create(&work.library.info, jpeg->version, jpeg->bytes);
    jpeg->destroy(&work.library.info);
    return true;
}

wf_status wf_jpeg_open(wf_jpeg **made, const char *path, char message[WF_MESSAGE_BYTES])
{
    *made = NULL;
    if (sizeof(void *) != 8 || sizeof(size_t) != 8) {
        snprintf(message, WF_MESSAGE_BYTES, "libjpeg-turbo's structures are known for 64 bits, this processor has %zu",
                 8 * sizeof(void *));
        return WF_BAD_PICTURE;
    }
    void *object = dlopen(path, RTLD_NOW | RTLD_LOCAL); /* never closed: it is Pillow's too */
    if (!object) {
        snprintf(message, WF_MESSAGE_BYTES, "no shared object: %.150s", dlerror());
        return WF_BAD_PICTURE;
    }
    wf_jpeg *jpeg = calloc(1, sizeof *jpeg);
    if (!jpeg) {
        snprintf(message, WF_MESSAGE_BYTES, "no memory");
        return WF_NO_MEMORY;
    }
    const struct {
        const char *name;
        void *function;
    } needed[] = {
        {"jpeg_CreateDecompress", &jpeg->create},      {"jpeg_read_header", &jpeg->read_header},
        {"jpeg_has_multiple_scans", &jpeg->has_multiple_scans}, {"jpeg_start_decompress", &jpeg->start},
        {"jpeg_crop_scanline", &jpeg->crop},           {"jpeg_skip_scanlines", &jpeg->skip},
        {"jpeg_read_scanlines", &jpeg->read},          {"jpeg_destroy_decompress", &jpeg->destroy},
    };
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        void *found = dlsym(object, needed[i].name);
        if (!found) {
            snprintf(message, WF_MESSAGE_BYTES, "it has no function %s", needed[i].name);
            free(jpeg);
            return WF_BAD_PICTURE;
        }
        memcpy(needed[i].function, &found, sizeof found); /* C has no conversion from data to code */
    }
    for (size_t i = 0; i < sizeof ABIS / sizeof *ABIS; i++) {
        jpeg->version = ABIS[i].version;
        jpeg->bytes = ABIS[i].bytes;
        if (is_known(jpeg, message)) {
            *made = jpeg;
            return WF_DONE;
        }
    }
    free(jpeg);
    snprintf(message, WF_MESSAGE_BYTES, "it is a libjpeg of another version than 6.2 and 8");
    return WF_BAD_PICTURE;
}

void wf_jpeg_close(wf_jpeg *jpeg)
{
    free(jpeg);
}

static wf_part widened(const wf_part *needed, int64_t height, int64_t width)
{
    const int64_t top = needed->top > EDGE_PX ? needed->top - EDGE_PX : 0, left = needed->left > EDGE_PX ? needed->left - EDGE_PX : 0;
    const int64_t bottom = needed->top + needed->height + EDGE_PX, right = needed->left + needed->width + EDGE_PX;
    return (wf_part){
        .top = top,
        .left = left,
        .height = (bottom < height ? bottom : height) - top,
        .width = (right < width ? right : width) - left,
    };
}

size_t wf_jpeg_part_bytes(const wf_part *needed)
{
    return 3 * (size_t)(needed->height + 2 * EDGE_PX) * (size_t)(needed->width + 2 * EDGE_PX + LARGEST_MCU_PX);
}

wf_status wf_jpeg_decode(const wf_jpeg *jpeg, const uint8_t *encoded, size_t bytes, int64_t height, int64_t width, const wf_part *needed,
                         uint8_t *pixels, wf_part *part, char message[WF_MESSAGE_BYTES])
{
    if (height < 1 || width < 1 || height > WF_LARGEST_SIDE_PX || width > WF_LARGEST_SIDE_PX || needed->top < 0 || needed->left < 0 ||
        needed->height < 1 || needed->width < 1 || needed->height > height - needed->top || needed->width > width - needed->left) {
        snprintf(message, WF_MESSAGE_BYTES, "a part of %lld x %lld pixels is outside %lld x %lld", (long long)needed->height,
                 (long long)needed->width, (long long)height, (long long)width);
        return WF_BAD_PICTURE;
    }
    const size_t room = wf_jpeg_part_bytes(needed);
    const wf_part asked = widened(needed, height, width);
    decoding work;
    prepare(&work, encoded, bytes, message);
    decompress *const info = &work.library.info;
    if (setjmp(work.complained)) { /* nothing that is read from here on was changed since */
        jpeg->destroy(info);
        return WF_BAD_PICTURE;
    }
    jpeg->create(info, jpeg->version, jpeg->bytes);
    info->src = &work.src;
    jpeg->read_header(info, 1);
    if (info->image_height != (unsigned)height || info->image_width != (unsigned)width)
        complain(&work, "the file's picture is %u x %u pixels", info->image_height, info->image_width);
    if (jpeg->has_multiple_scans(info))
        complain(&work, "the file has several scans");
    if (info->jpeg_color_space != GRAY && info->jpeg_color_space != RGB && info->jpeg_color_space != YCBCR)
        complain(&work, "the file's colors are of kind %d", info->jpeg_color_space);
    info->out_color_space = RGB;
    jpeg->start(info);
    unsigned left = (unsigned)asked.left, cols = (unsigned)asked.width;
    if (cols < (unsigned)width)
        jpeg->crop(info, &left, &cols);
    const bool holds = left <= (unsigned)needed->left && left + cols >= (unsigned)(needed->left + needed->width) && info->output_width == cols;
    if (!holds || info->output_components != 3 || 3 * (size_t)asked.height * cols > room)
        complain(&work, "libjpeg-turbo gives columns %u to %u of %d channels", left, left + cols, info->output_components);
    if (asked.top && jpeg->skip(info, (unsigned)asked.top) != (unsigned)asked.top)
        complain(&work, "libjpeg-turbo does not skip %lld rows", (long long)asked.top);
    const unsigned top = (unsigned)asked.top, bottom = top + (unsigned)asked.height;
    while (info->output_scanline < bottom) {
        uint8_t *rows[ROWS_AT_ONCE];
        const unsigned at = info->output_scanline, count = bottom - at < ROWS_AT_ONCE ? bottom - at : ROWS_AT_ONCE;
        for (unsigned i = 0; i < count; i++)
            rows[i] = pixels + 3 * (size_t)cols * (at - top + i);
        if (!jpeg->read(info, rows, count))
            complain(&work, "libjpeg-turbo gives no more rows after %u", at);
    }
    jpeg->destroy(info);
    *part = (wf_part){.top = asked.top, .left = left, .height = asked.height, .width = cols};
    return WF_DONE;
}
