/* A fuzzer for decoding parts of JPEGs: files as they are and damaged, in memory of exactly the size that is said.
 *
 * Here: what must hold beside memory safety: a part of a file that is as it was is that of the whole, bit for bit; nothing is written past
 * the memory that a part may take; a damaged file is decoded or refused in one line, and leaves nothing behind.
 * Not here: what sees a wrong access or a leak (AddressSanitizer, UBSan, Valgrind: test_jpeg_parts.py), right pixels (the same).
 * Usage: fuzz_decode_region LIBJPEG SPAN SEED PLANT FILE..., SPAN as in "60s" or "400cases"; PLANT is "nothing", or what is done wrong.
 */
#include "decode_region.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { CANARY = 64, CANARY_BYTE = 0xc3, MOST_FILES = 64 };

typedef struct {
    unsigned char *bytes;
    size_t size;
    int64_t height, width;
    unsigned char *whole; /* its pixels, or NULL: it is not served */
} file;

static uint64_t state, case_number;
static const char *plant;

static uint64_t draw(uint64_t below)
{
    /* splitmix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 */
    uint64_t mixed = state += 0x9e3779b97f4a7c15u;
    mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebu;
    return (mixed ^ mixed >> 31) % below;
}

static void fail(const char *what, const char *message)
{
    fprintf(stderr, "case %" PRIu64 ": %s: %s\n", case_number, what, message);
    exit(1);
}

static void *take(size_t bytes)
{
    void *memory = malloc(bytes + !bytes);
    if (!memory)
        fail("the harness", "no memory");
    return memory;
}

/* Decode a part into memory with a canary after it; returns the pixels, or NULL if the file is refused. */
static unsigned char *decode(const wf_jpeg *jpeg, const file *from, const unsigned char *bytes, size_t size, const wf_part *needed,
                             wf_part *part)
{
    const size_t room = wf_jpeg_part_bytes(needed);
    unsigned char *memory = take(room + CANARY);
    memset(memory, CANARY_BYTE, room + CANARY);
    char message[WF_MESSAGE_BYTES] = {0};
    const wf_status status = wf_jpeg_decode(jpeg, bytes, size, from->height, from->width, needed, memory, part, message);
    if (strcmp(plant, "overrun") == 0)
        memory[room] = 0;
    for (size_t i = 0; i < CANARY; i++)
        if (memory[room + i] != CANARY_BYTE)
            fail("it writes past its memory", message);
    if (status == WF_DONE && (part->top > needed->top || part->left > needed->left ||
                              part->top + part->height < needed->top + needed->height ||
                              part->left + part->width < needed->left + needed->width))
        fail("the part does not hold what was needed", message);
    if (status == WF_DONE)
        return memory;
    if (status != WF_BAD_PICTURE || !*message || strchr(message, '\n') || !memchr(message, 0, WF_MESSAGE_BYTES))
        fail("a refusal without a reason", message);
    free(memory);
    return NULL;
}

static void read_file(const wf_jpeg *jpeg, const char *path, file *to)
{
    FILE *stream = fopen(path, "rb");
    int height, width;
    if (!stream || sscanf(strrchr(path, '/') + 1, "%dx%d", &height, &width) != 2)
        fail("a file is not HEIGHTxWIDTH...", path);
    fseek(stream, 0, SEEK_END);
    to->size = (size_t)ftell(stream);
    rewind(stream);
    to->bytes = take(to->size);
    if (fread(to->bytes, 1, to->size, stream) != to->size)
        fail("a file cannot be read", path);
    fclose(stream);
    to->height = height;
    to->width = width;
    const wf_part all = {.height = height, .width = width};
    wf_part part;
    to->whole = decode(jpeg, to, to->bytes, to->size, &all, &part);
}

static unsigned char *damaged(const file *from, size_t *size)
{
    *size = draw(4) ? from->size : 1 + (size_t)draw(from->size);
    unsigned char *bytes = take(*size);
    memcpy(bytes, from->bytes, *size);
    for (uint64_t hits = 1 + draw(6); hits--;) {
        /* headers are a small part of a file and hold most of what can go wrong */
        const uint64_t at = draw(draw(2) ? *size : *size < 700 ? *size : 700);
        bytes[at] = draw(3) ? (unsigned char)draw(256) : bytes[at] ^ (unsigned char)(1u << draw(8));
    }
    return bytes;
}

static void run_case(const wf_jpeg *jpeg, const file *from, int64_t counts[3])
{
    wf_part needed, part;
    needed.top = (int64_t)draw((uint64_t)from->height);
    needed.left = (int64_t)draw((uint64_t)from->width);
    needed.height = 1 + (int64_t)draw((uint64_t)(from->height - needed.top));
    needed.width = 1 + (int64_t)draw((uint64_t)(from->width - needed.left));
    const int is_damaged = draw(5) > 0;
    size_t size = from->size;
    unsigned char *bytes = is_damaged ? damaged(from, &size) : from->bytes;
    unsigned char *pixels = decode(jpeg, from, bytes, size, &needed, &part);
    if (!is_damaged && (pixels != NULL) != (from->whole != NULL))
        fail("a sane file", pixels ? "is served in part, but not whole" : "is not served in part");
    for (int64_t row = needed.top; !is_damaged && pixels && row < needed.top + needed.height; row++) {
        unsigned char *here = pixels + 3 * ((row - part.top) * part.width + needed.left - part.left);
        if (strcmp(plant, "unequal") == 0)
            here[draw((uint64_t)(3 * needed.width))] ^= 1;
        if (memcmp(here, from->whole + 3 * (row * from->width + needed.left), (size_t)(3 * needed.width)))
            fail("a part is not that of the whole", "");
    }
    counts[!pixels ? 2 : is_damaged]++;
    if (strcmp(plant, "leak") != 0)
        free(pixels);
    if (is_damaged)
        free(bytes);
}

int main(int arguments, char **argument)
{
    if (arguments < 6 || arguments - 5 > MOST_FILES) {
        fprintf(stderr, "usage: %s LIBJPEG SPAN SEED PLANT FILE...\n", argument[0]);
        return 2;
    }
    char message[WF_MESSAGE_BYTES], *unit;
    plant = argument[4];
    wf_jpeg *jpeg;
    if (wf_jpeg_open(&jpeg, argument[1], message) != WF_DONE)
        fail(argument[1], message);
    const double span = strtod(argument[2], &unit);
    state = strtoull(argument[3], NULL, 10);
    file files[MOST_FILES] = {0};
    const int count = arguments - 5;
    for (int i = 0; i < count; i++)
        read_file(jpeg, argument[5 + i], &files[i]);
    int64_t counts[3] = {0}; /* sane and equal, damaged and decoded, refused */
    const time_t start = time(NULL);
    for (; strcmp(unit, "cases") == 0 ? (double)case_number < span : difftime(time(NULL), start) < span; case_number++)
        run_case(jpeg, &files[draw((uint64_t)count)], counts);
    printf("%" PRIu64 " cases: %" PRId64 " equal, %" PRId64 " damaged and decoded, %" PRId64 " refused\n", case_number, counts[0], counts[1],
           counts[2]);
    for (int i = 0; i < count; i++) {
        free(files[i].bytes);
        free(files[i].whole);
    }
    wf_jpeg_close(jpeg);
    return counts[0] && counts[1] && counts[2] ? 0 : 1;
}
