/* The Python module wherefrom.kernels._native around the CPU view kernel, for the limited API of Python 3.11 and later.
 *
 * Here: records, pictures and outputs come as buffers (numpy arrays), so that nothing is written or read whose size was not seen here; the
 * interpreter is free while pictures are rendered. Not here: what a record may hold (render_views_core.c), threads (thread_pool.c), shapes
 * (render_views.py).
 */
#define PY_SSIZE_T_CLEAN
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "decode_region.h"
#include "read_parts.h"
#include "render_views_core.h"
#include "thread_pool.h"

typedef struct {
    PyObject_HEAD
    wf_plan *plan;
    int families;
    Py_buffer *out; /* [families], held while the plan lives */
} Plan;

static const char *const DTYPES[] = {[WF_UINT8] = "uint8", [WF_FLOAT16] = "float16", [WF_BFLOAT16] = "bfloat16", [WF_FLOAT32] = "float32"};
static const int VALUE_BYTES[] = {[WF_UINT8] = 1, [WF_FLOAT16] = 2, [WF_BFLOAT16] = 2, [WF_FLOAT32] = 4};
static const char *const INSTRUCTION_SETS[] = {[WF_BASELINE] = "baseline", [WF_AVX2] = "avx2", [WF_AVX512] = "avx512"};

static int find_name(const char *name, const char *const *names, int count)
{
    for (int i = 0; i < count; i++)
        if (strcmp(name, names[i]) == 0)
            return i;
    return -1;
}

static PyObject *raise(wf_status status, const char *message)
{
    PyErr_SetString(status == WF_NO_MEMORY ? PyExc_MemoryError : PyExc_ValueError, message);
    return NULL;
}

/* Get a contiguous buffer of exactly `bytes`; None leaves view->obj NULL where that is allowed. */
static bool take_buffer(PyObject *object, Py_buffer *view, const char *name, int64_t bytes, bool optional, bool writable)
{
    if (optional && object == Py_None)
        return true;
    if (PyObject_GetBuffer(object, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0)
        return false;
    if (view->len == bytes)
        return true;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, expected %lld", name, view->len, (long long)bytes);
    return false;
}

enum { BOXES, FLIPPED, TURNS, MATRIX, SIGMA, SOLARIZED, RECORD_BUFFERS };

/* Read one family from its tuple into `family`, holding its buffers in `record` and `out`. */
static bool read_family(PyObject *tuple, int64_t pictures, wf_family *family, Py_buffer record[RECORD_BUFFERS], Py_buffer *out)
{
    static const char *const NAMES[] = {"boxes", "flipped", "quarter_turns", "matrix", "blur_sigma_px", "solarized"};
    static const int BYTES[] = {16, 1, 8, 48, 4, 1};
    PyObject *part[RECORD_BUFFERS], *out_object;
    const char *dtype_name;
    int channels_last, centered;
    long long views, height, width;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "a family is a tuple");
        return false;
    }
    if (!PyArg_ParseTuple(tuple, "LLLsppOOOOOO(fff)(fff)O", &views, &height, &width, &dtype_name, &channels_last, &centered, &part[BOXES],
                          &part[FLIPPED], &part[TURNS], &part[MATRIX], &part[SIGMA], &part[SOLARIZED], &family->scale[0], &family->scale[1],
                          &family->scale[2], &family->shift[0], &family->shift[1], &family->shift[2], &out_object))
        return false;
    const int dtype = find_name(dtype_name, DTYPES, 4);
    if (dtype < 0 || views < 0 || views > 1 << 20 || height < 1 || width < 1 || height > WF_LARGEST_VIEW_SIDE_PX ||
        width > WF_LARGEST_VIEW_SIDE_PX) {
        PyErr_Format(PyExc_ValueError, "size_px is (%lld, %lld), %lld views of %s: needs sides of 1 to %d", height, width, views,
                     dtype_name, WF_LARGEST_VIEW_SIDE_PX);
        return false;
    }
    for (int i = 0; i < RECORD_BUFFERS; i++)
        if (!take_buffer(part[i], &record[i], NAMES[i], pictures * views * BYTES[i], i >= MATRIX, false))
            return false;
    if (!take_buffer(out_object, out, "out", pictures * views * 3 * height * width * VALUE_BYTES[dtype], false, true))
        return false;
    family->views = views;
    family->height = height;
    family->width = width;
    family->dtype = (wf_dtype)dtype;
    family->channels_last = channels_last;
    family->centered = centered;
    family->boxes = record[BOXES].buf;
    family->flipped = record[FLIPPED].buf;
    family->quarter_turns = record[TURNS].buf;
    family->matrix = record[MATRIX].obj ? record[MATRIX].buf : NULL;
    family->blur_sigma_px = record[SIGMA].obj ? record[SIGMA].buf : NULL;
    family->solarized = record[SOLARIZED].obj ? record[SOLARIZED].buf : NULL;
    family->out = out->buf;
    return true;
}

static void release(Py_buffer *view)
{
    if (view->obj)
        PyBuffer_Release(view);
}

static void plan_dealloc(Plan *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    wf_plan_free(self->plan);
    for (int f = 0; f < self->families; f++)
        release(&self->out[f]);
    PyMem_Free(self->out);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"pictures", "orientation", "families", "instruction_set", NULL};
    long long pictures;
    PyObject *orientation_object, *families_object;
    const char *set_name;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "LOO!s", keywords, &pictures, &orientation_object, &PyTuple_Type, &families_object,
                                     &set_name))
        return NULL;
    const bool choose = strcmp(set_name, "auto") == 0;
    const int set = choose ? (int)wf_best_instruction_set() : find_name(set_name, INSTRUCTION_SETS, WF_INSTRUCTION_SETS);
    if (set < 0 || !wf_has_instruction_set((wf_instruction_set)set))
        return PyErr_Format(PyExc_ValueError, "instruction_set='%s': not on this processor; take one of instruction_sets()", set_name);
    if (pictures < 0 || pictures > 1 << 24)
        return PyErr_Format(PyExc_ValueError, "a batch of %lld pictures", pictures);
    const Py_ssize_t families = PyTuple_Size(families_object);
    if (families > 1 << 16)
        return PyErr_Format(PyExc_ValueError, "%zd families of views", families);

    Plan *self = (Plan *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self)
        return NULL;
    Py_buffer orientation = {0};
    wf_family *family = PyMem_Calloc((size_t)families + 1, sizeof *family);
    Py_buffer(*record)[RECORD_BUFFERS] = PyMem_Calloc((size_t)families + 1, sizeof *record);
    self->out = PyMem_Calloc((size_t)families + 1, sizeof *self->out);
    bool fine = family && record && self->out;
    if (!fine)
        PyErr_NoMemory();
    else
        self->families = (int)families;
    fine = fine && take_buffer(orientation_object, &orientation, "orientation", pictures, true, false);
    for (Py_ssize_t f = 0; fine && f < families; f++)
        fine = read_family(PyTuple_GetItem(families_object, f), pictures, &family[f], record[f], &self->out[f]);
    if (fine) {
        char message[WF_MESSAGE_BYTES];
        const wf_status status = wf_plan_make(&self->plan, pictures, orientation.obj ? orientation.buf : NULL, (int)families, family,
                                              (wf_instruction_set)set, message);
        if (status != WF_DONE)
            raise(status, message);
    }
    for (Py_ssize_t f = 0; record && f < families; f++)
        for (int i = 0; i < RECORD_BUFFERS; i++)
            release(&record[f][i]);
    release(&orientation);
    PyMem_Free(record);
    PyMem_Free(family);
    if (!self->plan) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

/* Look at one decoded picture, (H, W, 3) unsigned bytes in rows without gaps. */
static bool take_picture(PyObject *object, int64_t position, Py_buffer *view, wf_picture *picture)
{
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDED_RO | PyBUF_FORMAT) < 0)
        return false;
    if (view->ndim != 3 || view->shape[2] != 3 || view->itemsize != 1 || (view->format && strcmp(view->format, "B") != 0)) {
        PyErr_Format(PyExc_ValueError, "picture %lld has %d axes of format '%s', expected (H, W, 3) unsigned bytes", (long long)position,
                     view->ndim, view->format ? view->format : "B");
        return false;
    }
    if (!PyBuffer_IsContiguous(view, 'C')) {
        PyErr_Format(PyExc_ValueError, "picture %lld does not lie in one piece; copy it first", (long long)position);
        return false;
    }
    *picture = (wf_picture){.pixels = view->buf, .height = view->shape[0], .width = view->shape[1]};
    return true;
}

static PyObject *plan_render_picture(Plan *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_SetString(PyExc_TypeError, "render_picture takes a position and a picture");
        return NULL;
    }
    const long long position = PyLong_AsLongLong(args[0]);
    if (position == -1 && PyErr_Occurred())
        return NULL;
    const long long pictures = wf_plan_pictures(self->plan);
    if (position < 0 || position >= pictures)
        return PyErr_Format(PyExc_IndexError, "picture %lld of %lld; pictures are numbered 0 to %lld", position, pictures, pictures - 1);
    Py_buffer view = {0};
    wf_picture picture;
    char message[WF_MESSAGE_BYTES];
    wf_status status = WF_DONE;
    const bool fine = take_picture(args[1], position, &view, &picture);
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        status = wf_render_picture(self->plan, position, &picture, message);
        Py_END_ALLOW_THREADS
    }
    release(&view);
    if (!fine)
        return NULL;
    if (status != WF_DONE)
        return raise(status, message);
    Py_RETURN_NONE;
}

static const char JPEG[] = "wherefrom.kernels._native.jpeg";

static void close_capsule(PyObject *capsule)
{
    wf_jpeg_close(PyCapsule_GetPointer(capsule, JPEG));
}

static PyObject *open_jpeg(PyObject *Py_UNUSED(module), PyObject *path)
{
    PyObject *encoded;
    if (!PyUnicode_FSConverter(path, &encoded))
        return NULL;
    char message[WF_MESSAGE_BYTES];
    wf_jpeg *jpeg;
    const char *bytes = PyBytes_AsString(encoded);
    const wf_status status = bytes ? wf_jpeg_open(&jpeg, bytes, message) : WF_NO_MEMORY;
    Py_DECREF(encoded);
    if (!bytes)
        return NULL;
    if (status != WF_DONE)
        return raise(status, message);
    PyObject *capsule = PyCapsule_New(jpeg, JPEG, close_capsule);
    if (!capsule)
        wf_jpeg_close(jpeg);
    return capsule;
}

static PyObject *decode_part(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *capsule, *encoded_object;
    long long height, width, top, left, rows, cols;
    if (!PyArg_ParseTuple(args, "OOLL(LLLL)", &capsule, &encoded_object, &height, &width, &top, &left, &rows, &cols))
        return NULL;
    const wf_jpeg *jpeg = PyCapsule_GetPointer(capsule, JPEG);
    if (!jpeg)
        return NULL;
    const wf_part needed = {.top = top, .left = left, .height = rows, .width = cols};
    if (height < 1 || width < 1 || height > WF_LARGEST_SIDE_PX || width > WF_LARGEST_SIDE_PX || rows < 1 || cols < 1 || rows > height ||
        cols > width)
        return PyErr_Format(PyExc_ValueError, "a part of %lld x %lld pixels is outside %lld x %lld", rows, cols, height, width);
    Py_buffer encoded = {0};
    if (PyObject_GetBuffer(encoded_object, &encoded, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *pixels = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)wf_jpeg_part_bytes(&needed));
    if (!pixels) {
        release(&encoded);
        return NULL;
    }
    uint8_t *memory = (uint8_t *)PyByteArray_AsString(pixels);
    char message[WF_MESSAGE_BYTES];
    wf_part part;
    wf_status status;
    Py_BEGIN_ALLOW_THREADS
    status = wf_jpeg_decode(jpeg, encoded.buf, (size_t)encoded.len, height, width, &needed, memory, &part, message);
    Py_END_ALLOW_THREADS
    release(&encoded);
    if (status != WF_DONE) {
        Py_DECREF(pixels);
        return raise(status, message);
    }
    if (PyByteArray_Resize(pixels, (Py_ssize_t)(3 * part.height * part.width)) < 0) {
        Py_DECREF(pixels);
        return NULL;
    }
    return Py_BuildValue("N(LLLL)", pixels, (long long)part.top, (long long)part.left, (long long)part.height, (long long)part.width);
}

static const char POOL[] = "wherefrom.kernels._native.pool";
enum { MOST_THREADS = 4096 }; /* of a pool */

static void free_pool(PyObject *capsule)
{
    wf_pool_free(PyCapsule_GetPointer(capsule, POOL)); /* nobody uses it, so that its threads end at once */
}

static PyObject *make_pool(PyObject *Py_UNUSED(module), PyObject *threads_object)
{
    const long threads = PyLong_AsLong(threads_object);
    if (threads == -1 && PyErr_Occurred())
        return NULL;
    if (threads < 1 || threads > MOST_THREADS)
        return PyErr_Format(PyExc_ValueError, "threads=%ld: needs 1 to %d", threads, MOST_THREADS);
    wf_pool *pool = wf_pool_make((int)threads);
    PyObject *capsule = pool ? PyCapsule_New(pool, POOL, free_pool) : PyErr_NoMemory();
    if (pool && !capsule)
        wf_pool_free(pool);
    return capsule;
}

static PyObject *close_pool(PyObject *Py_UNUSED(module), PyObject *capsule)
{
    wf_pool *pool = PyCapsule_GetPointer(capsule, POOL);
    if (!pool)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    wf_pool_close(pool);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1000000000 * (int64_t)now.tv_sec + now.tv_nsec;
}

/* Files of a batch, which threads share, and what they make of them. */
typedef struct {
    const wf_plan *plan;
    const wf_jpeg *jpeg;
    Py_buffer *file;       /* [pictures]; none where the whole is to be decoded anyway */
    Py_buffer size, asked; /* (pictures, 2) int32 (height, width) as stored, (pictures,) bytes */
    bool *left;            /* [pictures]: the whole is to be decoded, the views are undefined */
    atomic_llong decode_ns, render_ns; /* summed over threads */
} jpeg_batch;

/* Decode what the views of picture number `position` read, and write them, without Python. WF_BAD_PICTURE, with views undefined, if the
 * whole is to be decoded. */
static wf_status render_jpeg(jpeg_batch *batch, int64_t position, char message[WF_MESSAGE_BYTES])
{
    const int64_t start_ns = now_ns();
    const int32_t *size = (const int32_t *)batch->size.buf + 2 * position;
    const Py_buffer *file = &batch->file[position];
    wf_part needed;
    wf_status status = wf_plan_needed(batch->plan, position, size[0], size[1], &needed, message);
    if (status != WF_DONE)
        return status;
    if (!needed.height)
        return WF_BAD_PICTURE;
    const size_t room = wf_jpeg_part_bytes(&needed);
    wf_scratch *scratch = wf_scratch_take(room);
    if (!scratch) {
        snprintf(message, WF_MESSAGE_BYTES, "no memory to decode picture %lld: %zu bytes", (long long)position, room);
        return WF_NO_MEMORY;
    }
    unsigned char *pixels = wf_scratch_memory(scratch);
    wf_picture picture = {.pixels = pixels, .height = size[0], .width = size[1]};
    status = wf_jpeg_decode(batch->jpeg, file->buf, (size_t)file->len, size[0], size[1], &needed, pixels, &picture.part, message);
    const int64_t decoded_ns = now_ns();
    if (status == WF_DONE)
        status = wf_render_picture(batch->plan, position, &picture, message);
    wf_scratch_give(scratch);
    atomic_fetch_add(&batch->decode_ns, decoded_ns - start_ns);
    atomic_fetch_add(&batch->render_ns, now_ns() - decoded_ns);
    return status;
}

/* Render a picture if it is asked for, and note whether its whole is to be decoded. */
static wf_status render_if_asked(void *shared, int64_t position, char message[WF_MESSAGE_BYTES])
{
    jpeg_batch *batch = shared;
    if (!((const unsigned char *)batch->asked.buf)[position])
        return WF_DONE;
    const wf_status status = render_jpeg(batch, position, message);
    batch->left[position] = status == WF_BAD_PICTURE;
    return batch->left[position] ? WF_DONE : status;
}

/* Look at the files, a sequence, and at what is known of them. */
static bool take_jpegs(PyObject *const *args, int64_t pictures, jpeg_batch *batch)
{
    batch->file = PyMem_Calloc((size_t)pictures + 1, sizeof *batch->file);
    batch->left = PyMem_Calloc((size_t)pictures + 1, sizeof *batch->left);
    if (!batch->file || !batch->left) {
        PyErr_NoMemory();
        return false;
    }
    if (!take_buffer(args[1], &batch->size, "sizes", 8 * pictures, false, false) ||
        !take_buffer(args[2], &batch->asked, "asked", pictures, false, false))
        return false;
    const Py_ssize_t files = PySequence_Size(args[0]);
    if (files != pictures) {
        if (files >= 0)
            PyErr_Format(PyExc_ValueError, "%zd files for the records of %lld", files, (long long)pictures);
        return false;
    }
    for (int64_t b = 0; b < pictures; b++) {
        if (!((const unsigned char *)batch->asked.buf)[b])
            continue;
        PyObject *file = PySequence_GetItem(args[0], b);
        const bool fine = file && PyObject_GetBuffer(file, &batch->file[b], PyBUF_SIMPLE) == 0;
        Py_XDECREF(file);
        if (!fine)
            return false;
    }
    return true;
}

static void release_jpegs(jpeg_batch *batch, int64_t pictures)
{
    for (int64_t b = 0; batch->file && b < pictures; b++)
        release(&batch->file[b]);
    release(&batch->size);
    release(&batch->asked);
    PyMem_Free(batch->file);
    PyMem_Free(batch->left);
}

/* Return a list of the positions that are marked. */
static PyObject *positions(const bool *marked, int64_t pictures)
{
    PyObject *list = PyList_New(0);
    for (int64_t b = 0; list && b < pictures; b++) {
        if (!marked[b])
            continue;
        PyObject *number = PyLong_FromLongLong(b);
        if (!number || PyList_Append(list, number) < 0)
            Py_CLEAR(list);
        Py_XDECREF(number);
    }
    return list;
}

static PyObject *plan_render_jpegs(Plan *self, PyObject *const *args, Py_ssize_t count)
{
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "render_jpegs takes files, their sizes, which of them to render, what open_jpeg returned, and "
                                         "what make_pool did or None");
        return NULL;
    }
    wf_pool *pool = NULL;
    const wf_jpeg *jpeg = PyCapsule_GetPointer(args[3], JPEG);
    if (!jpeg || (args[4] != Py_None && !(pool = PyCapsule_GetPointer(args[4], POOL))))
        return NULL;
    const int64_t pictures = wf_plan_pictures(self->plan);
    jpeg_batch batch = {.plan = self->plan, .jpeg = jpeg};
    PyObject *made = NULL;
    if (take_jpegs(args, pictures, &batch)) {
        char message[WF_MESSAGE_BYTES];
        wf_status status;
        Py_BEGIN_ALLOW_THREADS
        status = wf_pool_run(pool, pictures, render_if_asked, &batch, message);
        Py_END_ALLOW_THREADS
        if (status != WF_DONE)
            raise(status, message);
        else
            made = Py_BuildValue("Ndd", positions(batch.left, pictures), 1e-9 * (double)batch.decode_ns, 1e-9 * (double)batch.render_ns);
    }
    release_jpegs(&batch, pictures);
    return made;
}

static PyObject *plan_render_all(Plan *self, PyObject *args)
{
    PyObject *tuple;
    int threads;
    if (!PyArg_ParseTuple(args, "O!i", &PyTuple_Type, &tuple, &threads))
        return NULL;
    const Py_ssize_t count = PyTuple_Size(tuple);
    if (count != wf_plan_pictures(self->plan))
        return PyErr_Format(PyExc_ValueError, "%zd pictures for the records of %lld", count, (long long)wf_plan_pictures(self->plan));
    Py_buffer *view = PyMem_Calloc((size_t)count + 1, sizeof *view);
    wf_picture *picture = PyMem_Calloc((size_t)count + 1, sizeof *picture);
    bool fine = view && picture;
    if (!fine)
        PyErr_NoMemory();
    for (Py_ssize_t b = 0; fine && b < count; b++)
        fine = take_picture(PyTuple_GetItem(tuple, b), b, &view[b], &picture[b]);
    char message[WF_MESSAGE_BYTES];
    wf_status status = WF_DONE;
    if (fine) {
        Py_BEGIN_ALLOW_THREADS
        status = wf_render_all(self->plan, picture, threads, message);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t b = 0; view && b < count; b++)
        release(&view[b]);
    PyMem_Free(view);
    PyMem_Free(picture);
    if (!fine)
        return NULL;
    if (status != WF_DONE)
        return raise(status, message);
    Py_RETURN_NONE;
}

static PyMethodDef plan_methods[] = {
    {"render_picture", (PyCFunction)(void (*)(void))plan_render_picture, METH_FASTCALL,
     "render_picture(position, picture)\n--\n\nWrite all views of the batch's picture number `position`, (H, W, 3) uint8 as stored."},
    {"render_jpegs", (PyCFunction)(void (*)(void))plan_render_jpegs, METH_FASTCALL,
     "render_jpegs(files, sizes, asked, jpeg, pool)\n--\n\nWrite all views of those pictures of the batch that are asked for, from files of "
     "(height, width) as stored,\nof which only what they read is decoded, in the threads of a pool, or None: in the caller's.\n"
     "Return positions left whose whole is to be decoded, and the seconds of decoding and rendering, summed over threads."},
    {"render_all", (PyCFunction)plan_render_all, METH_VARARGS,
     "render_all(pictures, threads)\n--\n\nWrite all views of all pictures of the batch, a tuple, in `threads` threads."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot plan_slots[] = {
    {Py_tp_new, plan_new},
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_methods, plan_methods},
    {Py_tp_doc, "Plan(pictures, orientation, families, instruction_set)\n--\n\n"
                "A batch's records, checked and copied, and where its views go."},
    {0, NULL},
};

static PyType_Spec plan_spec = {
    .name = "wherefrom.kernels._native.Plan",
    .basicsize = sizeof(Plan),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = plan_slots,
};

static PyObject *instruction_sets(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    PyObject *names = PyList_New(0);
    for (int set = 0; names && set < WF_INSTRUCTION_SETS; set++) {
        if (!wf_has_instruction_set((wf_instruction_set)set))
            continue;
        PyObject *name = PyUnicode_FromString(INSTRUCTION_SETS[set]);
        if (!name || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* Whether parts, whole numbers from 0 on, lie in memory of so many bytes. */
static bool check_parts(const wf_file_part *part, int64_t parts, int64_t bytes)
{
    for (int64_t i = 0; i < parts; i++)
        if (part[i].offset < 0 || part[i].start < 0 || part[i].bytes < 0 || part[i].bytes > bytes || part[i].start > bytes - part[i].bytes) {
            PyErr_Format(PyExc_ValueError, "part %lld of %lld bytes at %lld leaves the memory of %lld bytes, or the file at %lld",
                         (long long)i, (long long)part[i].bytes, (long long)part[i].start, (long long)bytes, (long long)part[i].offset);
            return false;
        }
    return true;
}

static PyObject *read_parts(PyObject *Py_UNUSED(module), PyObject *args)
{
    int descriptor;
    PyObject *memory_object, *parts_object;
    if (!PyArg_ParseTuple(args, "iOO", &descriptor, &memory_object, &parts_object))
        return NULL;
    Py_buffer memory = {0}, parts = {0};
    PyObject *told = NULL;
    if (PyObject_GetBuffer(memory_object, &memory, PyBUF_WRITABLE) == 0 && PyObject_GetBuffer(parts_object, &parts, PyBUF_SIMPLE) == 0) {
        const int64_t count = parts.len / (Py_ssize_t)sizeof(wf_file_part);
        int64_t whole = 0, bytes_of_next = 0;
        int error = 0;
        bool fine = check_parts(parts.buf, count, memory.len);
        while (fine) {
            Py_BEGIN_ALLOW_THREADS
            error = wf_read_parts(descriptor, memory.buf, parts.buf, count, &whole, &bytes_of_next);
            Py_END_ALLOW_THREADS
            if (error != EINTR)
                break;
            fine = PyErr_CheckSignals() == 0; /* as Python's own reads: its handlers may raise */
        }
        if (fine)
            told = Py_BuildValue("LLi", (long long)whole, (long long)bytes_of_next, error);
    }
    release(&parts);
    release(&memory);
    return told;
}

static PyMethodDef module_methods[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS, "instruction_sets()\n--\n\nReturn those of this processor, slowest first."},
    {"open_jpeg", open_jpeg, METH_O,
     "open_jpeg(path)\n--\n\nReturn the libjpeg-turbo in a shared object, or in what it was linked with, for render_jpegs and decode_part."},
    {"decode_part", decode_part, METH_VARARGS,
     "decode_part(jpeg, file, height, width, part)\n--\n\nDecode (top, left, height, width) of a file of that size as stored; return the RGB "
     "bytes of a part\nthat holds it, and which that is."},
    {"read_parts", read_parts, METH_VARARGS,
     "read_parts(descriptor, memory, parts)\n--\n\nFill parts of memory, each (offset in the file, start, bytes), in order; return how many are "
     "whole, and of the next\nhow many bytes there were and the error that its read ended with, or 0."},
    {"make_pool", make_pool, METH_O,
     "make_pool(threads)\n--\n\nReturn threads for render_jpegs; they are made when there is work, and again in a process that is forked."},
    {"close_pool", close_pool, METH_O, "close_pool(pool)\n--\n\nEnd the threads once their work is done."},
    {NULL, NULL, 0, NULL},
};

static int fill_module(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &plan_spec, NULL);
    const int status = type ? PyModule_AddObjectRef(module, "Plan", type) : -1;
    Py_XDECREF(type);
    return status;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "wherefrom.kernels._native",
    .m_doc = "The CPU view kernel; wherefrom.kernels.render_views calls it.",
    .m_methods = module_methods,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module_definition);
}
