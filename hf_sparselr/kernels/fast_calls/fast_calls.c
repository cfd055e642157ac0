/* A call of packed layers that share their input, without Python: is everything as it was when their kernels were made
 * ready, and is nothing else wanted than the products? Then results are allocated and the kernels enqueued.
 * Else the answer is None, and Python does it.
 *
 * No header of Python or torch is needed: functions of Python's stable ABI are declared here, those of torch's C interface
 * and of the CUDA driver come as addresses.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct object PyObject;
typedef intptr_t Py_ssize_t;
typedef struct {
  const char *name;
  void *function;
  int flags;
  const char *doc;
} PyMethodDef;

#define METH_FASTCALL 0x80

extern void Py_IncRef(PyObject *), Py_DecRef(PyObject *);
extern PyObject *PyObject_Type(PyObject *);
extern PyObject *PyObject_GetAttr(PyObject *, PyObject *);
extern PyObject *PyObject_CallNoArgs(PyObject *);
extern PyObject *PyDict_GetItemWithError(PyObject *, PyObject *);
extern PyObject *PyUnicode_InternFromString(const char *);
extern PyObject *PyCapsule_New(void *, const char *, void (*)(PyObject *));
extern void *PyCapsule_GetPointer(PyObject *, const char *);
extern PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
extern PyObject *PySequence_GetItem(PyObject *, Py_ssize_t);
extern long long PyLong_AsLongLong(PyObject *);
extern void *PyEval_SaveThread(void), PyEval_RestoreThread(void *);
extern void PyErr_Clear(void), PyErr_SetString(PyObject *, const char *);
extern PyObject *PyErr_Occurred(void);
extern PyObject *PyExc_RuntimeError;

typedef int64_t word;

/* Addresses that Python gives, in this order. */
struct Interface {
  PyObject *none, *tensor, *parameter; /* None and the two types that are plain tensors */
  PyObject *autocast, *modes, *transforms; /* functions that return False, 0 and None if nothing is going on */
  PyObject *levels, *level;            /* a dict and its key: -1 outside of forward-mode derivatives */
  word offset;                         /* of the at::Tensor in the object */
  int (*data_pointer)(void *, void **);
  int (*numel)(void *, word *);
  int (*dimensions)(void *, word *);
  int (*sizes)(void *, word **);
  int (*dtype)(void *, int32_t *);
  int (*device_type)(void *, int32_t *);
  int (*device_index)(void *, int32_t *);
  int (*is_contiguous)(void *, bool *);
  bool (*grad_enabled)(void);
  int (*empty)(word, const word *, const word *, int32_t, int32_t, int32_t, void **);
  int (*from_memory)(void *, word, const word *, const word *, word, int32_t, int32_t, int32_t, void **);
  int (*delete)(void *);
  PyObject *(*wrap)(const void *);
  int (*threads)(void);
  int (*mm)(void *, void *, void *);
  int (*addmm)(void *, void *, void *, void *, double, double);
  int (*stream)(int32_t, void **);
  int (*launch)(const void *, void *, void **, void **);
  int (*is_capturing)(void *, int *);
  int (*context)(void **);
  word uint8;
} api;

enum { PARTS = 5, MEMBERS = 8, EXACT = 33, MOST_POWER = 13, BUCKETS = MOST_POWER + 1, DIMENSIONS = 16, SLOTS = 64, ARGUMENTS = 256 };

struct Member {
  word tensors[PARTS][2]; /* address and number of entries of mask, values, A, B, bias; -1 for None */
  word version, out;
  word object; /* the mask itself if it counts no edits, as tensors of inference mode, else 0 */
};

struct Group {
  word dtype, device_type, device, ins, count;
  word context; /* of the driver, 0 for the CPU */
  word is_cast; /* x is as autocast wants it */
  struct Member members[MEMBERS];
};

struct State {
  struct Group group;
  word *programs[EXACT + BUCKETS]; /* by the rows of x, then by powers of two */
  word misses; /* calls in which not all results were taken */
  PyObject *kernel;           /* "auto" or "packed" */
  PyObject *members[MEMBERS]; /* the dicts of their parameters; not of a lone one, whose calls bring it */
  PyObject *input, *outs[MEMBERS]; /* the last input, if results of it wait, and these */
  word version;
  void *stream;
};

static PyObject *names[PARTS], *version_name;
static struct { word device; void *stream; word address, bytes; } scratch[64];

static PyObject *nothing(void) {
  Py_IncRef(api.none);
  return api.none;
}

static void *tensor_of(PyObject *object) { return (char *)object + api.offset; }

static bool is_plain(PyObject *object) {
  PyObject *type = PyObject_Type(object);
  Py_DecRef(type);
  return type == api.tensor || type == api.parameter;
}

/* Tensors of inference mode count no edits. */
static word version_of(PyObject *object) {
  PyObject *number = PyObject_GetAttr(object, version_name);
  if (!number) return PyErr_Clear(), -1;
  word version = PyLong_AsLongLong(number);
  Py_DecRef(number);
  return version;
}

static bool says(PyObject *function, bool none) {
  PyObject *answer = PyObject_CallNoArgs(function);
  if (!answer) return PyErr_Clear(), true;
  bool yes = none ? answer != api.none : PyLong_AsLongLong(answer) != 0;
  Py_DecRef(answer);
  return yes;
}

/* No gradients, autocast, transforms or modes, which might want something else than the product. */
static bool is_quiet(const struct Group *group) {
  if (api.grad_enabled() || (!group->is_cast && says(api.autocast, false)) || says(api.modes, false) ||
      says(api.transforms, true))
    return false;
  PyObject *level = PyDict_GetItemWithError(api.levels, api.level);
  return level && PyLong_AsLongLong(level) < 0;
}

/* parts: of the member, as they are now. */
static bool is_same(const struct Member *member, PyObject *parameters, PyObject **parts) {
  for (int i = 0; i < PARTS; i++) {
    PyObject *object = parts[i] = PyDict_GetItemWithError(parameters, names[i]);
    const word *expected = member->tensors[i];
    if (!object) return PyErr_Clear(), false;
    if (object == api.none) {
      if (expected[0] != -1) return false;
      continue;
    }
    void *address;
    word entries;
    if (!is_plain(object) || api.data_pointer(tensor_of(object), &address) || api.numel(tensor_of(object), &entries))
      return false;
    if ((word)address != expected[0] || entries != expected[1]) return false;
    if (i == 0 && (member->object ? (word)object != member->object : version_of(object) != member->version)) return false;
  }
  return true;
}

/* The rows of x if it is plain, contiguous, at an address for wide loads and fits the weights; else -1. */
static word rows_of(const struct Group *group, void *x, word *dimensions, word **sizes, void **address) {
  int32_t dtype, type, device;
  bool contiguous;
  word entries;
  if (api.dtype(x, &dtype) || dtype != group->dtype || api.device_type(x, &type) || type != group->device_type) return -1;
  if (api.device_index(x, &device) || device != group->device || api.dimensions(x, dimensions)) return -1;
  if (*dimensions < 1 || *dimensions > DIMENSIONS || api.sizes(x, sizes) || (*sizes)[*dimensions - 1] != group->ins)
    return -1;
  if (api.is_contiguous(x, &contiguous) || !contiguous || api.numel(x, &entries) || api.data_pointer(x, address)) return -1;
  return entries && !((word)*address % 16) ? entries / group->ins : -1;
}

static int entry_of(word rows) {
  if (rows < EXACT) return (int)rows;
  int power = 0;
  while (power < MOST_POWER && ((word)1 << power) < rows) power++;
  return EXACT + power;
}

static void *empty(const word *sizes, word dimensions, int32_t dtype, const struct Group *group) {
  word strides[DIMENSIONS], stride = 1;
  for (word i = dimensions; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  void *tensor = NULL;
  return api.empty(dimensions, sizes, strides, dtype, (int32_t)group->device_type, (int32_t)group->device, &tensor) ? NULL
                                                                                                                   : tensor;
}

/* (..., out) */
static void *result(const word *sizes, word dimensions, word out, const struct Group *group) {
  word shape[DIMENSIONS];
  memcpy(shape, sizes, (size_t)dimensions * sizeof(word));
  shape[dimensions - 1] = out;
  return empty(shape, dimensions, (int32_t)group->dtype, group);
}

struct Config { /* CUlaunchConfig */
  uint32_t grid[3], block[3], shared;
  void *stream, *attributes;
  uint32_t count;
};

struct Attribute {
  uint32_t id, pad, value[16];
};

static word address_in(const word *slots, word slot, word value) { return slot < 0 ? value : slots[slot]; }

static const word *launch(const word *step, const word *slots, void *stream, int *status) {
  struct Attribute serialization = {6, 0, {1}};
  struct Config config = {{1, 1, 1}, {(uint32_t)step[1], 1, 1}, (uint32_t)step[2], stream, &serialization, (uint32_t)step[3]};
  for (int i = 0; i < 3; i++) {
    const word *size = step + 4 + 3 * i;
    config.grid[i] = (uint32_t)(size[0] ? (slots[0] * size[0] + size[1] - 1) / size[1] : size[2]);
  }
  word count = step[13], values[ARGUMENTS];
  void *places[ARGUMENTS];
  const word *given = step + 14;
  for (word i = 0; i < count; i++) {
    values[i] = address_in(slots, given[2 * i], given[2 * i + 1]);
    places[i] = values + i;
  }
  *status = api.launch(&config, (void *)step[0], places, NULL);
  return given + 2 * count;
}

static void *matrix(word address, word rows, word columns, bool transposed, const struct Group *group) {
  word sizes[2] = {rows, columns}, strides[2] = {transposed ? 1 : columns, transposed ? rows : 1};
  void *tensor = NULL;
  int failed = api.from_memory((void *)address, 2, sizes, strides, 0, (int32_t)group->dtype, (int32_t)group->device_type,
                               (int32_t)group->device, &tensor);
  return failed ? NULL : tensor;
}

static const word *multiply(const word *step, const word *slots, const struct Group *group, int *status) {
  word rows = slots[0], n = step[4], k = step[5], right = address_in(slots, step[2], step[3]);
  void *out = matrix(slots[step[0]], rows, n, false, group), *left = matrix(slots[step[1]], rows, k, false, group);
  void *factor = matrix(right, k, n, !step[8], group), *bias = NULL;
  *status = !out || !left || !factor;
  if (step[6]) {
    word one = 1;
    *status |= api.from_memory((void *)step[6], 1, &n, &one, 0, (int32_t)group->dtype, (int32_t)group->device_type,
                               (int32_t)group->device, &bias);
  }
  if (!*status) {
    if (step[7] || bias) *status = api.addmm(out, bias ? bias : out, left, factor, 1, 1);
    else *status = api.mm(out, left, factor);
  }
  void *all[] = {out, left, factor, bias};
  for (int i = 0; i < 4; i++)
    if (all[i]) api.delete(all[i]);
  return step + 9;
}

enum { REFUSED = -2 }; /* Python says why */

typedef int PackedProduct(const void *, word, word, const word *, word, int, int, word *);

/* `multiply` of `cpu/packed.c`. Other threads run meanwhile. */
static const word *multiply_packed(const word *step, const word *slots, int *status) {
  PackedProduct *product = (PackedProduct *)step[0];
  word kept;
  void *thread = PyEval_SaveThread();
  if (product(step + 4, step[2], slots[1], slots + 2, slots[0], (int)step[1], api.threads(), &kept)) *status = REFUSED;
  PyEval_RestoreThread(thread);
  return step + 4 + step[3];
}

static int run(const word *step, word count, const word *slots, void *stream, const struct Group *group) {
  int status = 0;
  for (word i = 0; i < count && !status; i++) {
    word kind = *step++;
    if (kind == 0) step = launch(step, slots, stream, &status);
    else if (kind == 1) step = multiply(step, slots, group, &status);
    else step = multiply_packed(step, slots, &status);
  }
  return status;
}

/* The address of the stream's scratch memory if it has so many bytes, else 0. */
static word scratch_of(word device, void *stream, word bytes) {
  for (int i = 0; i < 64 && scratch[i].address; i++)
    if (scratch[i].device == device && scratch[i].stream == stream)
      return scratch[i].bytes >= bytes ? scratch[i].address : 0;
  return 0;
}

static void forget(struct State *state) {
  for (int i = 0; i < MEMBERS; i++) {
    if (state->outs[i]) Py_DecRef(state->outs[i]);
    state->outs[i] = NULL;
  }
  if (state->input) Py_DecRef(state->input);
  state->input = NULL;
}

/* Bytes of a memory, a multiple of 256. */
static word size_of(const word *memory, word rows) { return (memory[1] + memory[2] * rows + 255) / 256 * 256; }

/* Runs a program: 1 with the results as new objects, 0 if it is for Python, -1 with an error set. */
static int execute(const struct Group *group, const word *program, word rows, const word *sizes, word dimensions, void *x,
                   void *stream, PyObject **outs) {
  word slots[SLOTS] = {rows, (word)x};
  void *held[MEMBERS + 1] = {0}; /* results, then memory */
  word count = program[0], memories = program[1];
  const word *memory = program + 2, *steps = memory + 3 * memories;
  int status = 0;
  for (word i = 0; i < memories; i++) { /* first: nothing is allocated yet */
    if (!memory[3 * i]) continue;
    word start = scratch_of(group->device, stream, memory[3 * i + 2]);
    if (!start) return 0;
    slots[2 + count + i] = start + memory[3 * i + 1];
  }
  for (word i = 0; i < count && !status; i++) {
    void *address = NULL;
    held[i] = result(sizes, dimensions, group->members[i].out, group);
    status = !held[i] || api.data_pointer(held[i], &address);
    slots[2 + i] = (word)address;
  }
  word bytes = 0; /* of all memory, which is one allocation */
  for (word i = 0; i < memories; i++)
    if (!memory[3 * i]) bytes += size_of(memory + 3 * i, rows);
  if (bytes && !status) {
    void *address = NULL;
    held[count] = empty(&bytes, 1, (int32_t)api.uint8, group);
    status = !held[count] || api.data_pointer(held[count], &address);
    for (word i = 0; i < memories && !status; i++)
      if (!memory[3 * i]) {
        slots[2 + count + i] = (word)address;
        address = (char *)address + size_of(memory + 3 * i, rows);
      }
  }
  if (status) PyErr_SetString(PyExc_RuntimeError, "no memory for the results of packed layers");
  else if ((status = run(steps + 1, *steps, slots, stream, group)) && status != REFUSED) {
    char text[64];
    snprintf(text, sizeof text, "a packed layer failed to launch: error %d", status);
    PyErr_SetString(PyExc_RuntimeError, text);
  }
  for (word i = 0; i < count && !status; i++)
    if (!(outs[i] = api.wrap(held[i]))) status = -1;
  for (word i = 0; i <= count; i++)
    if (held[i]) api.delete(held[i]);
  return status == REFUSED ? 0 : status ? -1 : 1;
}

/* Whether the device is the current one, and no graph is captured. stream: the current one, NULL for the CPU. */
static bool is_current(const struct Group *group, void **stream) {
  void *context;
  int capturing = 0;
  *stream = NULL;
  if (!group->context) return true;
  return !api.stream((int32_t)group->device, stream) && !api.context(&context) && (word)context == group->context &&
         !api.is_capturing(*stream, &capturing) && !capturing;
}

/* call(parameters, x, kernel) -> the first member's result or None; those of the others wait. */
static PyObject *call(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  struct State *state = PyCapsule_GetPointer(self, NULL);
  struct Group *group = &state->group;
  if (count != 3 || given[2] != state->kernel || !is_plain(given[1])) return nothing();
  if (group->count > 1 && given[0] != state->members[0]) return nothing();
  if (state->input) forget(state), state->misses++; /* the last call's group was none */
  if (state->misses >= 3) return nothing();
  word dimensions, *sizes;
  void *x, *stream;
  word rows = rows_of(group, tensor_of(given[1]), &dimensions, &sizes, &x);
  const word *program = rows < 0 ? NULL : state->programs[entry_of(rows)];
  if (!program || !is_quiet(group)) return nothing();
  if (!is_current(group, &stream)) return nothing();
  word version = group->count > 1 ? version_of(given[1]) : 0;
  if (version < 0) return nothing(); /* inference mode: an edit before the next call would not be seen */
  PyObject *outs[MEMBERS] = {0}, *parts[MEMBERS * PARTS];
  for (word i = 0; i < group->count; i++)
    if (!is_same(group->members + i, i ? state->members[i] : given[0], parts + i * PARTS)) return nothing();
  for (word i = 0; i < group->count * PARTS; i++) Py_IncRef(parts[i]);
  int done = execute(group, program, rows, sizes, dimensions, x, stream, outs);
  for (word i = 0; i < group->count * PARTS; i++) Py_DecRef(parts[i]);
  if (done < 0) {
    for (int i = 0; i < MEMBERS; i++)
      if (outs[i]) Py_DecRef(outs[i]);
    return NULL;
  }
  if (!done) return nothing();
  if (group->count > 1) {
    forget(state); /* another thread may have been here */
    for (word i = 1; i < group->count; i++) state->outs[i] = outs[i];
    Py_IncRef(given[1]);
    state->input = given[1], state->version = version, state->stream = stream;
  }
  return outs[0];
}

/* take(parameters, x, kernel) -> the waiting result of another member or None. */
static PyObject *take(PyObject *self, PyObject *const *given, Py_ssize_t count) {
  struct State *state = PyCapsule_GetPointer(self, NULL);
  struct Group *group = &state->group;
  if (!state->input) return nothing();
  void *stream = NULL;
  word which = 1;
  if (count != 3) return nothing();
  while (which < group->count && state->members[which] != given[0]) which++;
  if (which == group->count) return nothing();
  PyObject *out = state->outs[which];
  bool fits = out && given[1] == state->input && given[2] == state->kernel && version_of(given[1]) == state->version;
  fits = fits && (!group->context || !api.stream((int32_t)group->device, &stream)) && stream == state->stream && is_quiet(group);
  if (!fits) return forget(state), state->misses++, nothing();
  state->outs[which] = NULL;
  for (word i = 1; i < group->count; i++)
    if (state->outs[i]) return out;
  forget(state);
  return out;
}

static void end(PyObject *self) {
  struct State *state = PyCapsule_GetPointer(self, NULL);
  forget(state);
  for (int i = 0; i < MEMBERS; i++)
    if (state->members[i]) Py_DecRef(state->members[i]);
  Py_DecRef(state->kernel);
  for (int i = 0; i < EXACT + BUCKETS; i++) free(state->programs[i]);
  free(state);
}

/* From here on: called by ctypes, with the GIL. */

void set_up(const struct Interface *interface) {
  api = *interface;
  const char *parts[] = {"mask", "values", "A", "B", "bias"};
  for (int i = 0; i < PARTS; i++) names[i] = PyUnicode_InternFromString(parts[i]);
  version_name = PyUnicode_InternFromString("_version");
}

/* A capsule, for members whose parameters are in these dicts. */
PyObject *new_group(const struct Group *group, PyObject *kernel, PyObject *members) {
  struct State *state = calloc(1, sizeof(struct State));
  if (!state) return nothing();
  state->group = *group;
  Py_IncRef(kernel), state->kernel = kernel;
  for (word i = 0; i < group->count && group->count > 1; i++) state->members[i] = PySequence_GetItem(members, i);
  return PyCapsule_New(state, NULL, end);
}

/* The function of the first member, or of the others. */
PyObject *function_of(PyObject *capsule, int first) {
  static PyMethodDef definitions[] = {{"take", take, METH_FASTCALL, NULL}, {"call", call, METH_FASTCALL, NULL}};
  return PyCFunction_NewEx(definitions + !!first, capsule, NULL);
}

/* Takes a program for so many rows of x. */
void learn(PyObject *capsule, word rows, const word *program, word size) {
  struct State *state = PyCapsule_GetPointer(capsule, NULL);
  word **place = state->programs + entry_of(rows), *copied = malloc((size_t)size * sizeof(word));
  if (!copied) return;
  free(*place);
  *place = memcpy(copied, program, (size_t)size * sizeof(word));
}

/* Whether results wait, and in how many calls some were left. */
int waits(PyObject *capsule) { return ((struct State *)PyCapsule_GetPointer(capsule, NULL))->input != NULL; }
word misses(PyObject *capsule) { return ((struct State *)PyCapsule_GetPointer(capsule, NULL))->misses; }

/* 0 where there is no room for one more. */
int set_scratch(word device, void *stream, word address, word bytes) {
  for (int i = 0; i < 64; i++)
    if (!scratch[i].address || (scratch[i].device == device && scratch[i].stream == stream)) {
      scratch[i].device = device, scratch[i].stream = stream, scratch[i].address = address, scratch[i].bytes = bytes;
      return 1;
    }
  return 0;
}
