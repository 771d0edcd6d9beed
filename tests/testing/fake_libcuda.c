/* A made-up libcuda.so.1 with DEVICES devices, for tests of cute_fa/engine/host_runtime.c: every call succeeds, runs
 * nothing, and is written down as a line "NAME numbers…". A thread has a current context or none; that of device d is
 * CONTEXT + d. fake_fail makes the next calls of a function fail, here or from the start by FAKE_CUDA_FAIL=NAME:CODE.
 *
 * Build: cc -shared -fPIC -Wl,-soname,libcuda.so.1 [-DNAME=another, for a driver without NAME] fake_libcuda.c
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DEVICES = 3, STATIC_BYTES = 1024, OPT_IN_BYTES = 232448, CONTEXT = 0x1000, LIBRARY = 0x2000, KERNEL = 0x3000 };
enum { INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, CAPTURE_UNSUPPORTED = 900 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char calls[1 << 20];
static size_t written;
static char failing[64];
static int code, times, load_microseconds, libraries, version = 13000;
static const void *last_code;
static __thread uintptr_t context;
static __thread int capturing, capture_mode; /* 2: relaxed */
static int no_clusters;

const char *fake_calls(void) { return calls; }
void fake_clear(void) { calls[written = 0] = 0; }
void fake_fail(const char *name, int with, int how_often) {
  snprintf(failing, sizeof failing, "%s", name);
  code = with, times = how_often;
}
void fake_set_load_time(int microseconds) { load_microseconds = microseconds; }
void fake_set_capturing(int value) { capturing = value; } /* in this thread */
int fake_capture_mode(void) { return capture_mode; }
void fake_set_no_clusters(int value) { no_clusters = value; }
const void *fake_last_code(void) { return last_code; }

static void write_down(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (written + 1024 < sizeof calls) written += vsnprintf(calls + written, 1024, format, arguments);
  va_end(arguments);
}

/* The error that a call is to give; writes it down. */
static int called(const char *name, const char *format, ...) {
  char numbers[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(numbers, sizeof numbers, format, arguments);
  va_end(arguments);
  pthread_mutex_lock(&lock);
  write_down("%s %s\n", name, numbers);
  int error = times && !strcmp(failing, name) ? (times--, code) : 0;
  pthread_mutex_unlock(&lock);
  return error;
}
#define CALLED(...) do { int error = called(__func__, __VA_ARGS__); if (error) return error; } while (0)
#define NOT_CAPTURING do { if (capturing && capture_mode != 2) return CAPTURE_UNSUPPORTED; } while (0)
#define LONG(pointer) ((long)(uintptr_t)(pointer))
#define IS_LOADED(handle, first) (LONG(handle) > first && LONG(handle) <= first + libraries)

__attribute__((constructor)) static void start(void) {
  const char *asked = getenv("FAKE_CUDA_FAIL"), *newest = getenv("FAKE_CUDA_VERSION");
  if (asked && sscanf(asked, "%63[^:]:%d", failing, &code) == 2) times = 1 << 30;
  if (newest) version = atoi(newest);
}

int cuInit(unsigned flags) { CALLED(""); return 0; }
int cuDriverGetVersion(int *found) { *found = version; return 0; }
int cuGetErrorName(int error, const char **text) {
  *text = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
        : error == 100 ? "CUDA_ERROR_NO_DEVICE" : NULL;
  return *text ? 0 : INVALID_VALUE;
}
int cuGetErrorString(int error, const char **text) {
  *text = error == 2 ? "out of memory" : error == 209 ? "no kernel image is available for execution on the device"
        : error == 100 ? "no CUDA-capable device is detected" : NULL;
  return *text ? 0 : INVALID_VALUE;
}
int cuCtxGetCurrent(void **found) { *found = (void *)context; return 0; }
int cuCtxSetCurrent(void *chosen) { CALLED("%ld", LONG(chosen) - CONTEXT); context = (uintptr_t)chosen; return 0; }
int cuCtxGetDevice(int *device) {
  if (!context) return INVALID_CONTEXT;
  *device = (int)(context - CONTEXT);
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int *mode) {
  int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **found, int device) {
  CALLED("%d", device);
  *found = (void *)(uintptr_t)(CONTEXT + device);
  return device < DEVICES ? 0 : INVALID_VALUE;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  CALLED("%d %d", attribute, device);
  *value = attribute == 97 ? OPT_IN_BYTES : 0; /* CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
  return *value ? 0 : INVALID_VALUE;
}
int cuLibraryLoadData(void **library, const void *image, int *a, void **b, unsigned n, int *c, void **d, unsigned m) {
  NOT_CAPTURING;
  usleep(load_microseconds);
  last_code = image;
  CALLED("%u %u", n, m);
  *library = (void *)(uintptr_t)(LIBRARY + __atomic_add_fetch(&libraries, 1, __ATOMIC_RELAXED));
  return 0;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  CALLED("%ld %s", LONG(library) - LIBRARY, name);
  if (!IS_LOADED(library, LIBRARY)) return INVALID_HANDLE;
  *kernel = (void *)(LONG(library) - LIBRARY + KERNEL);
  return 0;
}
int cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  CALLED("%d %ld %d", attribute, LONG(kernel) - KERNEL, device);
  *value = STATIC_BYTES;
  if (!IS_LOADED(kernel, KERNEL)) return INVALID_HANDLE;
  return attribute == 1 ? 0 : INVALID_VALUE; /* CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES */
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  NOT_CAPTURING;
  CALLED("%d %d %ld %d", attribute, value, LONG(kernel) - KERNEL, device);
  if (attribute == 14 && no_clusters) return INVALID_VALUE; /* CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED */
  return IS_LOADED(kernel, KERNEL) ? 0 : INVALID_HANDLE;
}

typedef struct {
  unsigned grid[3], block[3], smem;
  void *stream, *attributes;
  unsigned n_attributes;
} launch_config;

int cuLaunchKernelEx(const launch_config *c, void *kernel, void **arguments, void **extra) {
  char attributes[160] = "";
  for (unsigned i = 0; i < c->n_attributes && i < 4; i++) { /* a CUlaunchAttribute has 72 bytes: id, 4 unused, value */
    const unsigned *words = (const unsigned *)((const char *)c->attributes + 72 * i);
    sprintf(attributes + strlen(attributes), " %u %u", words[0], words[2]);
    if (words[0] == 4) sprintf(attributes + strlen(attributes), " %u %u", words[3], words[4]); /* a cluster's extents */
  }
  CALLED("%ld %d %u %u %u %u %u %u %u %ld%s", LONG(kernel) - KERNEL, context ? (int)(context - CONTEXT) : -1, c->grid[0],
         c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->smem, LONG(c->stream), attributes);
  return !IS_LOADED(kernel, KERNEL) ? INVALID_HANDLE : arguments && !extra ? 0 : INVALID_VALUE;
}
