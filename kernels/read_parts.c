/* Parts of a file, read by position: no thread moves a place that others read from. No mmap: a file that is cut short would kill the process.
 */
#define _FILE_OFFSET_BITS 64 /* also where an address has 32 */
#include "read_parts.h"

#include <errno.h>
#include <unistd.h>

int wf_read_parts(int descriptor, unsigned char *memory, const wf_file_part *part, int64_t parts, int64_t *whole, int64_t *count)
{
    for (; *whole < parts; ++*whole, *count = 0)
        while (*count < part[*whole].bytes) {
            const wf_file_part *of = &part[*whole];
            const ssize_t got = pread(descriptor, memory + of->start + *count, (size_t)(of->bytes - *count), of->offset + *count);
            if (got <= 0)
                return got < 0 ? errno : 0;
            *count += got;
        }
    return 0;
}
