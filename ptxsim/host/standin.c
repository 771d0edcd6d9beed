/* The simulated CUDA runtime, and its stand-in for libcute_dsl_runtime.so, through which the CuTe DSL's host code calls
 * CUDA.
 *
 * A runtime library that can be switched asks ptxsim_function(name) for the functions below. NVIDIA's cannot: the DSL's
 * engine binds the symbols of that library once per process, to the copy loaded first. So this one is loaded
 * instead of it: it exports every symbol of the real library (PTXSIM_SYMBOLS, enumerated by standin.py from the real
 * library's ELF symbol table) as a jump through a table, and ptxsim_switch() fills the table with the addresses of
 * either world: the real library, opened privately, or the functions below. A call in the real world costs one jump
 * more than without.
 *
 * Every function has the signature of the CUDA function of the same name without the leading underscore, but for
 * _cudaLaunchKernel, whose dim3s are six integers. What needs thought is done in Python: report(event, arguments...).
 *
 * Build: cc -shared -fPIC -include symbols.h -DPTXSIM_REAL='"/path/of/the/real/library"' standin.c -ldl
 * Without PTXSIM_SYMBOLS and PTXSIM_REAL, where there is no DSL, the trampolines are left out.
 */
#ifndef __x86_64__
#error "the trampolines are written for x86-64"
#endif
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))

enum { ERROR_NOT_SIMULATED = 801, ERROR_NO_LIBRARY = 999, ERROR_INVALID_HANDLE = 400, ERROR_MEMORY = 2 };

/* ---- trampolines ------------------------------------------------------------------------------------------------ */

#ifdef PTXSIM_SYMBOLS
enum {
#define X(index, name) index_of_##name = index,
  PTXSIM_SYMBOLS(X)
#undef X
  N_SYMBOLS
};
static const char *const symbol_name[N_SYMBOLS] = {
#define X(index, name) #name,
    PTXSIM_SYMBOLS(X)
#undef X
};

HIDDEN void *ptxsim_target[N_SYMBOLS]; /* where the trampolines jump now */
static void *real_target[N_SYMBOLS], *simulated_target[N_SYMBOLS];

/* The exported symbol, and the function that stands for it in the simulated world if this file has no other. */
#define X(index, name)                                             \
  __asm__(".text\n.globl " #name "\n.type " #name ", @function\n"  \
          #name ": jmp *ptxsim_target+8*" #index "(%rip)\n"        \
          ".size " #name ", .-" #name "\n"                         \
          "ptxsim_missing_" #index ": movl $" #index ", %edi\n"    \
          "jmp ptxsim_not_simulated\n");
PTXSIM_SYMBOLS(X)
#undef X
#define X(index, name) extern HIDDEN char ptxsim_missing_##index[];
PTXSIM_SYMBOLS(X)
#undef X
#endif

/* ---- Python ----------------------------------------------------------------------------------------------------- */

enum event {
  LOAD_LIBRARY, GET_KERNEL, LAUNCH, TENSOR_MAP, DEVICE_ATTRIBUTE, KERNEL_ATTRIBUTE, ALLOCATED, FREED, NOT_SIMULATED
};
typedef int (*callback_t)(int event, const uint64_t *arguments);
static callback_t callback;
static char message[8192]; /* what went wrong in the last launch, for the DSL's own error reports */

static int report(enum event event, const uint64_t *arguments) {
  return callback ? callback(event, arguments) : ERROR_NO_LIBRARY;
}
#define U(x) ((uint64_t)(uintptr_t)(x))
#define REPORT(event, ...) report(event, (const uint64_t[]){__VA_ARGS__})

#ifdef PTXSIM_SYMBOLS
HIDDEN int ptxsim_not_simulated(int index) { return REPORT(NOT_SIMULATED, U(symbol_name[index])); }
#endif

PUBLIC void ptxsim_set_callback(callback_t f) { callback = f; }
PUBLIC void ptxsim_set_message(const char *text) { snprintf(message, sizeof message, "%s", text); }

static int idle; /* whether launches are accepted without running anything */
PUBLIC void ptxsim_set_idle(int value) { idle = value; }

/* Handles that Python hands out carry this tag in their upper half, so that the worlds can be told apart. */
#define TAG UINT64_C(0x50545853)
static int is_simulated(const void *handle) { return U(handle) >> 32 == TAG; }

/* ---- libraries and kernels -------------------------------------------------------------------------------------- */

static int sim__cudaLibraryLoadData(void **library, const void *code) {
  return REPORT(LOAD_LIBRARY, U(library), U(code));
}
static int sim__cuLibraryLoadData(void **library, const void *code) {
  return REPORT(LOAD_LIBRARY, U(library), U(code));
}
static int sim__cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  return REPORT(GET_KERNEL, U(kernel), U(library), U(name));
}
static int sim__cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  return REPORT(GET_KERNEL, U(kernel), U(library), U(name));
}
static int sim__cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) { return 0; }
static int sim__cudaFuncSetAttribute(void *function, int attribute, int value) { return 0; }
static int sim__cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  return REPORT(KERNEL_ATTRIBUTE, U(value), attribute, U(kernel));
}

static int sim_cuda_dialect_init_library_once(void **slot, int (*init)(void **), int (*load)(void **, int),
                                              void (*set_error)(const char *, const char *)) {
  void *library = NULL;
  if (*slot) return 0;
  int error = init(&library);
  if (!error && load) error = load(&library, 0);
  if (error) {
    if (set_error) set_error("RuntimeError", message);
    return -1;
  }
  *slot = library;
  return 0;
}
static void sim_cuda_dialect_unload_library_once(void **slot) {
  if (is_simulated(*slot)) *slot = NULL;
}

/* ---- the device ------------------------------------------------------------------------------------------------- */

static int sim__cudaGetDevice(int *device) { *device = 0; return 0; }
static int sim__cudaSetDevice(int device) { return 0; }
static int sim__cudaGetDeviceCount(int *count) { *count = 1; return 0; }
static int sim__cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
static int sim__cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return REPORT(DEVICE_ATTRIBUTE, U(value), attribute);
}
static int sim__cudaDeviceSynchronize(void) { return 0; }
static int sim__cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t smem) {
  *blocks = 1;
  return 0;
}
static int sim__cudaStreamSynchronize(void *stream) { return 0; }
static int sim__cudaStreamCreate(void **stream) { *stream = NULL; return 0; }
static int sim__cudaStreamDestroy(void *stream) { return 0; }

/* ---- launches --------------------------------------------------------------------------------------------------- */

typedef struct { /* cudaLaunchConfig_t */
  unsigned grid[3], block[3];
  size_t smem;
  void *stream, *attributes;
  unsigned n_attributes;
} launch_config;

static int sim__cudaLaunchKernelEx(const launch_config *config, void *kernel, void **arguments) {
  return idle ? 0 : REPORT(LAUNCH, U(config), U(kernel), U(arguments));
}
static int sim__cudaLaunchKernel(void *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, void **arguments, size_t smem, void *stream) {
  launch_config config = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, smem, stream, NULL, 0};
  return sim__cudaLaunchKernelEx(&config, kernel, arguments);
}
static int sim__cuTensorMapEncodeTiled(void *map, int dtype, unsigned rank, void *base, const uint64_t *extent,
                                       const uint64_t *stride, const uint32_t *box, const uint32_t *element_stride,
                                       int interleave, int swizzle, int l2, int fill) {
  return REPORT(TENSOR_MAP, U(map), dtype, rank, U(base), U(extent), U(stride), U(box), U(element_stride), interleave,
                swizzle, fill);
}

/* ---- memory: the host's is the device's ------------------------------------------------------------------------- */

static int sim__cudaMalloc(void **pointer, size_t bytes) {
  *pointer = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *pointer ? REPORT(ALLOCATED, U(*pointer), bytes) : ERROR_MEMORY;
}
static int sim__cudaMallocAsync(void **pointer, size_t bytes, void *stream) { return sim__cudaMalloc(pointer, bytes); }
static int sim__cudaFree(void *pointer) {
  REPORT(FREED, U(pointer));
  free(pointer);
  return 0;
}
static int sim__cudaFreeAsync(void *pointer, void *stream) { return sim__cudaFree(pointer); }
static int sim__cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { memcpy(to, from, bytes); return 0; }
static int sim__cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  memcpy(to, from, bytes);
  return 0;
}
static int sim__cudaMemset(void *to, int value, size_t bytes) { memset(to, value, bytes); return 0; }
static int sim__cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) { memset(to, value, bytes); return 0; }

/* ---- error reports ---------------------------------------------------------------------------------------------- */

static const char *sim_cuda_dialect_get_error_name(int error) { return error ? "simulatedError" : "cudaSuccess"; }
static const char *sim_CuteDSLRT_GetErrorName(int error) { return sim_cuda_dialect_get_error_name(error); }
static const char *sim_CuteDSLRT_GetErrorString(int error) { return error ? message : "no error"; }
static void sim_cuda_dialect_print_on_error(int error) {
  if (error) fprintf(stderr, "ptxsim: %s\n", message);
}
static void sim_cuda_dialect_assert_success(int error) { sim_cuda_dialect_print_on_error(error); }
static void sim_CuteDSLRT_TVMFFISetRaisedCudaError(void (*raise)(const char *, const char **, int), int error) {
  const char *parts[1] = {message};
  if (raise) raise("RuntimeError", parts, 1);
}
static void sim_CuteDSLRT_TVMFFISetRaisedCudaLaunchError(void (*raise)(const char *, const char **, int), int error) {
  sim_CuteDSLRT_TVMFFISetRaisedCudaError(raise, error);
}

static const struct { const char *name; void *function; } simulated[] = {
#define S(name) {#name, (void *)sim_##name},
    S(_cudaLibraryLoadData) S(_cuLibraryLoadData) S(_cudaLibraryGetKernel) S(_cuLibraryGetKernel)
    S(_cudaKernelSetAttributeForDevice) S(_cudaFuncSetAttribute) S(_cuKernelGetAttribute)
    S(cuda_dialect_init_library_once) S(cuda_dialect_unload_library_once) S(_cudaGetDevice) S(_cudaSetDevice) S(_cudaGetDeviceCount) S(_cuDeviceGet)
    S(_cudaDeviceGetAttribute) S(_cudaDeviceSynchronize) S(_cudaOccupancyMaxActiveBlocksPerMultiprocessor)
    S(_cudaStreamSynchronize) S(_cudaStreamCreate) S(_cudaStreamDestroy) S(_cudaLaunchKernelEx) S(_cudaLaunchKernel)
    S(_cuTensorMapEncodeTiled) S(_cudaMalloc) S(_cudaMallocAsync) S(_cudaFree) S(_cudaFreeAsync) S(_cudaMemcpy)
    S(_cudaMemcpyAsync) S(_cudaMemset) S(_cudaMemsetAsync) S(cuda_dialect_get_error_name) S(CuteDSLRT_GetErrorName)
    S(CuteDSLRT_GetErrorString) S(cuda_dialect_print_on_error) S(cuda_dialect_assert_success)
    S(CuteDSLRT_TVMFFISetRaisedCudaError) S(CuteDSLRT_TVMFFISetRaisedCudaLaunchError)
#undef S
};

/* The function that stands for one of the runtime's in the simulated world; NULL if there is none. */
PUBLIC void *ptxsim_function(const char *name) {
  for (size_t i = 0; i < sizeof simulated / sizeof *simulated; i++)
    if (!strcmp(name, simulated[i].name)) return simulated[i].function;
  return NULL;
}

#ifdef PTXSIM_SYMBOLS
/* ---- functions that obey the handle they are given, in both worlds ----------------------------------------------- */

#define REAL(name, ...) ((int (*)())real_target[index_of_##name])(__VA_ARGS__)

/* A function loaded in one world and called in the other must not hand its handle to the wrong library. A real handle
 * in the simulated world is refused by Python. */
static int guarded_launch(const launch_config *config, void *kernel, void **arguments) {
  return is_simulated(kernel) ? ERROR_INVALID_HANDLE : REAL(_cudaLaunchKernelEx, config, kernel, arguments);
}
static int guarded_plain_launch(void *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                unsigned block_y, unsigned block_z, void **arguments, size_t smem, void *stream) {
  return is_simulated(kernel) ? ERROR_INVALID_HANDLE
                              : REAL(_cudaLaunchKernel, kernel, grid_x, grid_y, grid_z, block_x, block_y, block_z,
                                     arguments, smem, stream);
}
/* Engines are destroyed whenever Python collects them, whichever world is on. */
static int guarded_unload(void *library) { return is_simulated(library) ? 0 : REAL(_cudaLibraryUnload, library); }
static int guarded_cu_unload(void *library) { return is_simulated(library) ? 0 : REAL(_cuLibraryUnload, library); }
static int guarded_unload_once(void **slot) {
  if (!is_simulated(*slot)) return REAL(cuda_dialect_unload_library_once, slot);
  *slot = NULL;
  return 0;
}

/* ---- set-up ----------------------------------------------------------------------------------------------------- */

static char load_error[512];
static int no_real_library(void) { return ERROR_NO_LIBRARY; }

/* Why the real library could not be opened; empty if it was. */
PUBLIC const char *ptxsim_load_error(void) { return load_error; }

PUBLIC void ptxsim_switch(int simulate) {
  memcpy(ptxsim_target, simulate ? simulated_target : real_target, sizeof ptxsim_target);
  if (!simulate) {
    ptxsim_target[index_of__cudaLaunchKernelEx] = (void *)guarded_launch;
    ptxsim_target[index_of__cudaLaunchKernel] = (void *)guarded_plain_launch;
  }
  ptxsim_target[index_of__cudaLibraryUnload] = (void *)guarded_unload;
  ptxsim_target[index_of__cuLibraryUnload] = (void *)guarded_cu_unload;
  ptxsim_target[index_of_cuda_dialect_unload_library_once] = (void *)guarded_unload_once;
}

__attribute__((constructor)) static void open_real_library(void) {
  void *real = dlopen(PTXSIM_REAL, RTLD_NOW | RTLD_LOCAL);
  if (!real) snprintf(load_error, sizeof load_error, "%s", dlerror());
  for (int i = 0; i < N_SYMBOLS; i++) {
    void *found = real ? dlsym(real, symbol_name[i]) : NULL;
    real_target[i] = found ? found : (void *)no_real_library;
  }
#define X(index, name) \
  simulated_target[index] = ptxsim_function(#name) ? ptxsim_function(#name) : (void *)ptxsim_missing_##index;
  PTXSIM_SYMBOLS(X)
#undef X
  ptxsim_switch(0);
}
#endif
