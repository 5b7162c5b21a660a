/* Parts of a file, read into one stretch of memory. Plain C11, no Python. Not here: which file, and what lies where in it. */
#ifndef WHEREFROM_READ_PARTS_H
#define WHEREFROM_READ_PARTS_H

#include <stdint.h>

typedef struct {
    int64_t offset, start, bytes; /* in the file, in the memory */
} wf_file_part;

/* Fill parts in order, from byte *count of part *whole on, until all are whole, the file ends, or a read fails: *whole says how many are,
 * *count how many bytes of the next. Returns 0 or what errno was; after EINTR the same call goes on. All parts lie in the memory. */
int wf_read_parts(int descriptor, unsigned char *memory, const wf_file_part *part, int64_t parts, int64_t *whole, int64_t *count);

#endif
