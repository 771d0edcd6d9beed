/* The CUDA runtime of bundled kernels: what the DSL's host code asks of NVIDIA's libcute_dsl_runtime.so, over libcuda.
 *
 * Host code that the DSL exports needs eleven functions (RUNTIME below). They have the signatures of the functions of the
 * CUDA runtime of the same name without the leading underscore; the three without one are the DSL's. A bundle's kernels are
 * linked with --wrap for each, so that they call __wrap_NAME of this library and never meet NVIDIA's library, whose
 * names are the same, in a process that has both. One copy serves a process: the loader finds it by its soname.
 *
 * libcuda is opened at the first use. A kernel is prepared (attributes set) on a device when it is first launched there,
 * so that no context appears on other devices. A simulator takes over by host_runtime_switch().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define PUBLIC __attribute__((visibility("default")))

/* The oldest versions of these symbols: a linker of glibc 2.34 or newer would ask for 2.34, and manylinux_2_28 has less. */
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver dlerror, dlerror@GLIBC_2.2.5");

/* ---- libcuda ---------------------------------------------------------------------------------------------------- */

typedef struct { /* CUlaunchConfig; cudaLaunchConfig_t has the same layout, but for the 64 bits of its smem */
  unsigned grid[3], block[3];
  unsigned smem, zero;
  void *stream, *attributes;
  unsigned n_attributes;
} launch_config;

#define DRIVER(X)                                                                                                       \
  X(cuInit, (unsigned flags))                                                                                           \
  X(cuDriverGetVersion, (int *version))                                                                                 \
  X(cuGetErrorName, (int error, const char **text))                                                                     \
  X(cuGetErrorString, (int error, const char **text))                                                                   \
  X(cuCtxGetCurrent, (void **context))                                                                                  \
  X(cuCtxSetCurrent, (void *context))                                                                                   \
  X(cuCtxGetDevice, (int *device))                                                                                      \
  X(cuThreadExchangeStreamCaptureMode, (int *mode))                                                                     \
  X(cuDevicePrimaryCtxRetain, (void **context, int device))                                                             \
  X(cuDeviceGetAttribute, (int *value, int attribute, int device))                                                      \
  X(cuLibraryLoadData, (void **library, const void *code, int *jit_options, void **jit_values, unsigned n_jit,          \
                        int *library_options, void **library_values, unsigned n_library))                               \
  X(cuLibraryGetKernel, (void **kernel, void *library, const char *name))                                               \
  X(cuKernelGetAttribute, (int *value, int attribute, void *kernel, int device))                                        \
  X(cuKernelSetAttribute, (int attribute, int value, void *kernel, int device))                                         \
  X(cuLaunchKernelEx, (const launch_config *config, void *kernel, void **arguments, void **extra))

static struct {
#define X(name, arguments) int(*name) arguments;
  DRIVER(X)
#undef X
} driver;

enum { NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14 }; /* CU_FUNC_ATTRIBUTE_… */
enum { CAPTURE_MODE_RELAXED = 2 };               /* CU_STREAM_CAPTURE_MODE_… */
enum { SUCCESS = 0, NO_DRIVER = -1, WRONG_WORLD = -2, READY = -3 }; /* CUDA's codes are positive */
static char no_driver[512]; /* why libcuda cannot be used */
static int driver_state;    /* 0: not tried; READY; NO_DRIVER; a code of cuInit */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int open_driver(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(no_driver, sizeof no_driver, "%s", dlerror());
    return NO_DRIVER;
  }
#define X(name, arguments)                                                                      \
  if (!(*(void **)&driver.name = dlsym(library, #name))) {                                      \
    snprintf(no_driver, sizeof no_driver, "libcuda.so.1 has no " #name ": the driver is older than CUDA 12"); \
    return NO_DRIVER;                                                                           \
  }
  DRIVER(X)
#undef X
  int error = driver.cuInit(0);
  return error ? error : READY;
}

/* SUCCESS, or why libcuda cannot be used; a failure is final, as cuInit's own is. */
static int ready(void) {
  int state = __atomic_load_n(&driver_state, __ATOMIC_ACQUIRE);
  if (!state) {
    pthread_mutex_lock(&lock);
    if (!(state = driver_state)) __atomic_store_n(&driver_state, state = open_driver(), __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
  }
  return state == READY ? SUCCESS : state;
}

/* The device of the calling thread's context. Without one it is device 0, whose primary context is then made current:
 * the CUDA runtime does the same. */
static int current_device(int *device) {
  void *context = NULL;
  int error = driver.cuCtxGetCurrent(&context);
  if (!error && !context) {
    error = driver.cuDevicePrimaryCtxRetain(&context, 0);
    if (!error) error = driver.cuCtxSetCurrent(context);
  }
  return error ? error : driver.cuCtxGetDevice(device);
}

/* What a code means, in the buffer or a constant. */
static const char *described(int error, char *buffer, size_t size) {
  if (error == NO_DRIVER) return no_driver;
  if (error == WRONG_WORLD) return "the kernel was loaded into a simulation and is launched outside it";
  const char *name = NULL, *text = NULL;
  if (driver.cuGetErrorName) driver.cuGetErrorName(error, &name);
  if (driver.cuGetErrorString) driver.cuGetErrorString(error, &text);
  snprintf(buffer, size, "CUDA error %d, %s: %s", error, name ? name : "unknown", text ? text : "unknown");
  return buffer;
}

/* ---- the eleven functions on a GPU ------------------------------------------------------------------------------ */

typedef void (*set_error_t)(const char *kind, const char *message);
typedef void (*raise_t)(const char *kind, const char **parts, int n_parts);
typedef int (*init_t)(void **library);
typedef int (*load_t)(void **library, int device);

static int gpu__cudaLibraryLoadData(void **library, const void *code, int *jit_options, void **jit_values, unsigned n_jit,
                                    int *library_options, void **library_values, unsigned n_library) {
  return driver.cuLibraryLoadData(library, code, jit_options, jit_values, n_jit, library_options, library_values, n_library);
}
static int gpu__cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  return driver.cuLibraryGetKernel(kernel, library, name);
}
static int gpu__cudaGetDevice(int *device) {
  int error = ready();
  return error ? error : current_device(device);
}
static int gpu__cudaDeviceGetAttribute(int *value, int attribute, int device) {
  int error = ready();
  return error ? error : driver.cuDeviceGetAttribute(value, attribute, device);
}
static int gpu__cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  return driver.cuKernelGetAttribute(value, attribute, kernel, device);
}
static int gpu__cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  int error = driver.cuKernelSetAttribute(attribute, value, kernel, device);
  /* Host code asks for clusters beyond the portable size for every kernel, with clusters or without, also on devices that
   * have none. Where it is refused, the launch of a kernel that needs it says so. */
  return attribute == NON_PORTABLE_CLUSTER_SIZE_ALLOWED ? SUCCESS : error;
}
static int gpu__cudaFuncSetAttribute(void *kernel, int attribute, int value) { /* a cudaKernel_t passes for a function */
  int device, error = current_device(&device);
  return error ? error : driver.cuKernelSetAttribute(attribute, value, kernel, device);
}
static int gpu__cudaLaunchKernelEx(const launch_config *config, void *kernel, void **arguments) {
  return driver.cuLaunchKernelEx(config, kernel, arguments, NULL);
}

/* What a kernel library's slot points to here. The host code hands the slot to the two functions below alone. */
typedef struct {
  void *library;
  uint64_t devices; /* a bit for each device that the library's kernels are prepared on */
} loaded_library;

/* Handles of a simulator's have bits that no address has. */
static int is_foreign(const void *slot_value) { return (uintptr_t)slot_value >> 47 != 0; }

static int prepare(void **slot, int device, init_t init, load_t load) {
  loaded_library *found = *slot;
  if (!found) {
    void *library = NULL;
    int error = init(&library);
    if (error) return error;
    if (!(found = calloc(1, sizeof *found))) return 2; /* CUDA_ERROR_OUT_OF_MEMORY */
    found->library = library;
    __atomic_store_n(slot, found, __ATOMIC_RELEASE);
  }
  if (device < 64 && found->devices >> device & 1) return SUCCESS;
  int error = load ? load(&found->library, device) : SUCCESS;
  if (!error && device < 64) __atomic_or_fetch(&found->devices, UINT64_C(1) << device, __ATOMIC_RELEASE);
  return error;
}

/* Before each launch: the library is loaded, and its kernels are prepared on the current device. 0 or −1 with an error
 * set. NVIDIA's prepares them on every visible device at once, which takes a context on each. */
static int gpu_cuda_dialect_init_library_once(void **slot, init_t init, load_t load, set_error_t set_error) {
  loaded_library *found = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
  int device, error = is_foreign(found) ? WRONG_WORLD : ready();
  if (!error) error = current_device(&device);
  if (!error) {
    if (found && device < 64 && __atomic_load_n(&found->devices, __ATOMIC_ACQUIRE) >> device & 1) return SUCCESS;
    pthread_mutex_lock(&lock);
    /* While a stream is being captured, the driver refuses what may wait for the device, loading code among it, unless
     * the thread says that it does no harm. */
    int mode = CAPTURE_MODE_RELAXED;
    error = driver.cuThreadExchangeStreamCaptureMode(&mode);
    if (!error) {
      error = prepare(slot, device, init, load);
      driver.cuThreadExchangeStreamCaptureMode(&mode);
    }
    pthread_mutex_unlock(&lock);
  }
  if (!error) return SUCCESS;
  char buffer[512];
  if (set_error) set_error("RuntimeError", described(error, buffer, sizeof buffer));
  return -1;
}

/* At the end of the process: the driver frees everything, and may be gone. */
static void gpu_cuda_dialect_unload_library_once(void **slot) {}

static void gpu_CuteDSLRT_TVMFFISetRaisedCudaError(raise_t raise, int error) {
  char buffer[512];
  const char *parts[1] = {described(error, buffer, sizeof buffer)};
  raise("RuntimeError", parts, 1);
}

/* ---- the functions that kernels call ---------------------------------------------------------------------------- */

#define RUNTIME(X)                                                                                                      \
  X(int, _cudaLibraryLoadData, (void **a, const void *b, int *c, void **d, unsigned e, int *f, void **g, unsigned h),   \
    (a, b, c, d, e, f, g, h))                                                                                           \
  X(int, _cudaLibraryGetKernel, (void **a, void *b, const char *c), (a, b, c))                                          \
  X(int, _cudaGetDevice, (int *a), (a))                                                                                 \
  X(int, _cudaDeviceGetAttribute, (int *a, int b, int c), (a, b, c))                                                    \
  X(int, _cuKernelGetAttribute, (int *a, int b, void *c, int d), (a, b, c, d))                                          \
  X(int, _cudaKernelSetAttributeForDevice, (void *a, int b, int c, int d), (a, b, c, d))                                \
  X(int, _cudaFuncSetAttribute, (void *a, int b, int c), (a, b, c))                                                     \
  X(int, _cudaLaunchKernelEx, (const launch_config *a, void *b, void **c), (a, b, c))                                   \
  X(int, cuda_dialect_init_library_once, (void **a, init_t b, load_t c, set_error_t d), (a, b, c, d))                   \
  X(void, cuda_dialect_unload_library_once, (void **a), (a))                                                            \
  X(void, CuteDSLRT_TVMFFISetRaisedCudaError, (raise_t a, int b), (a, b))

static struct {
#define X(type, name, parameters, arguments) type(*name) parameters;
  RUNTIME(X)
#undef X
} world = {
#define X(type, name, parameters, arguments) gpu_##name,
    RUNTIME(X)
#undef X
};

#define X(type, name, parameters, arguments) \
  PUBLIC type __wrap_##name parameters { return world.name arguments; }
RUNTIME(X)
#undef X

/* Calls go to the functions that `find` gives for the names above, or with NULL to the GPU. Returns the name of the
 * first one that it does not know, and then changes nothing. */
PUBLIC const char *host_runtime_switch(void *(*find)(const char *name)) {
#define X(type, name, parameters, arguments) \
  if (find && !find(#name)) return #name;
  RUNTIME(X)
#undef X
#define X(type, name, parameters, arguments) world.name = find ? (type(*) parameters)find(#name) : gpu_##name;
  RUNTIME(X)
#undef X
  return NULL;
}

/* The newest CUDA that the driver supports, as 1000·major + 10·minor; 0 and a text where there is no driver. */
PUBLIC int host_runtime_driver_version(const char **reason) {
  static char text[512];
  int version = 0, error = ready();
  if (!error) error = driver.cuDriverGetVersion(&version);
  if (error) *reason = described(error, text, sizeof text);
  return error ? 0 : version;
}
