/* A stand-in for NVIDIA's driver library, of one H100 that runs nothing.

   With it Triton compiles a kernel, packs its arguments and launches it, as on a GPU, and what the driver would refuse
   is refused here: grids, blocks and shared memory beyond the part's, and tensor maps that the hardware cannot follow
   (the conditions of cuTensorMapEncodeTiled in CUDA's driver API). It counts what it was asked for. */

#include "cuda.h"
#include <stdio.h>
#include <string.h>

#define SHARED_MEMORY 232448
#define OK(name, ...) \
    CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

int launches, tensor_maps;
static char refused[256];
static int loaded; /* modules: each has one function, of the same handle */

static CUresult refuse(const char *what, long long got) {
    snprintf(refused, sizeof refused, "%s: %lld", what, got);
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_SUCCESS ? "no error" : refused;
    return CUDA_SUCCESS;
}

OK(cuInit, unsigned int flags)
OK(cuCtxSetCurrent, CUcontext context)
OK(cuCtxSetLimit, CUlimit limit, size_t value)
OK(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
OK(cuModuleUnload, CUmodule module)
OK(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)

CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { return *device = i, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_MEMORY; break;
    default: *value = 1;
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)(size_t)++loaded;
    return memcmp(image, "\177ELF", 4) ? refuse("the image is no cubin", 0) : CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return *function = (CUfunction)module, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    int shared = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    return shared && value > SHARED_MEMORY ? refuse("bytes of shared memory", value) : CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    memcpy(data, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    if (!function || !parameters) return refuse("no function, or no parameters", 0);
    if (config->gridDimX < 1 || config->gridDimX > 2147483647u) return refuse("gridDim.x", config->gridDimX);
    if (config->gridDimY < 1 || config->gridDimY > 65535) return refuse("gridDim.y", config->gridDimY);
    if (config->gridDimZ < 1 || config->gridDimZ > 65535) return refuse("gridDim.z", config->gridDimZ);
    if (config->blockDimX < 32 || config->blockDimX > 1024) return refuse("blockDim.x", config->blockDimX);
    if (config->sharedMemBytes > SHARED_MEMORY) return refuse("bytes of shared memory", config->sharedMemBytes);
    launches++;
    return CUDA_SUCCESS;
}

static int element_size(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
    default: return 0;
    }
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill
) {
    static const int widths[] = {0, 32, 64, 128};
    int size = element_size(type), width = swizzle <= CU_TENSOR_MAP_SWIZZLE_128B ? widths[swizzle] : 0;
    if (!size) return refuse("data type of a tensor map", type);
    if (rank < 1 || rank > 5) return refuse("rank of a tensor map", rank);
    if ((size_t)address % 16) return refuse("address of a tensor map", (long long)(size_t)address);
    for (cuuint32_t i = 0; i < rank; i++) {
        if (sizes[i] < 1 || sizes[i] > 4294967296) return refuse("size of a tensor map", sizes[i]);
        if (box[i] < 1 || box[i] > 256) return refuse("box of a tensor map", box[i]);
        if (steps[i] < 1 || steps[i] > 8) return refuse("element stride of a tensor map", steps[i]);
        if (i + 1 < rank && (!strides[i] || strides[i] % 16 || strides[i] >> 40))
            return refuse("stride of a tensor map", strides[i]);
    }
    if (box[0] * size % 16) return refuse("bytes of a box's row", box[0] * size);
    if (width && (int)box[0] * size > width) return refuse("bytes of a swizzled box's row", box[0] * size);
    memset(map, 0, sizeof *map);
    memcpy(map, &address, sizeof address); /* opaque to all but the hardware: here what tells two apart */
    memcpy((char *)map + 8, sizes, 8 * (rank > 2 ? 2 : rank));
    memcpy((char *)map + 24, box, 4 * (rank > 2 ? 2 : rank));
    tensor_maps++;
    return CUDA_SUCCESS;
}
