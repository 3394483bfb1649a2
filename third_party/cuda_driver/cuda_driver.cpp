// The functions of the CUDA driver that ggml-cuda calls, each passed on to libcuda.so.1, which is opened at the first call.
//
// Linked against libcuda.so.1 itself, the module could be built only where the driver or the toolkit's stub of it is, and
// loaded only where the driver is: one build would not serve machines with and without a GPU. The CUDA runtime opens the
// driver in the same way, finds no device where there is none, and then ggml calls none of these.

#include <cuda.h>
#include <dlfcn.h>

namespace {

constexpr CUresult kNoDriver = CUDA_ERROR_NO_DEVICE;

void* driver_function(const char* name) {
    // Never closed: the runtime keeps the driver open as well.
    static void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return driver == nullptr ? nullptr : dlsym(driver, name);
}

}  // namespace

// cuda.h gives some functions a versioned name by a macro; this is the name after it.
#define LLAMA_MOE_NAME(function) LLAMA_MOE_QUOTED(function)
#define LLAMA_MOE_QUOTED(function) #function

#define LLAMA_MOE_PASS_ON(function, parameters, arguments)                                                         \
    extern "C" CUresult CUDAAPI function parameters {                                                              \
        static const auto driver_version = reinterpret_cast<decltype(&function)>(driver_function(LLAMA_MOE_NAME(function))); \
        return driver_version == nullptr ? kNoDriver : driver_version arguments;                                   \
    }

LLAMA_MOE_PASS_ON(cuDeviceGet, (CUdevice * device, int ordinal), (device, ordinal))
LLAMA_MOE_PASS_ON(cuDeviceGetAttribute, (int* value, CUdevice_attribute attribute, CUdevice device), (value, attribute, device))
LLAMA_MOE_PASS_ON(cuMemAddressFree, (CUdeviceptr pointer, size_t size), (pointer, size))
LLAMA_MOE_PASS_ON(
    cuMemAddressReserve,
    (CUdeviceptr * pointer, size_t size, size_t alignment, CUdeviceptr address, unsigned long long flags),
    (pointer, size, alignment, address, flags))
LLAMA_MOE_PASS_ON(
    cuMemCreate,
    (CUmemGenericAllocationHandle * handle, size_t size, const CUmemAllocationProp* properties, unsigned long long flags),
    (handle, size, properties, flags))
LLAMA_MOE_PASS_ON(
    cuMemGetAllocationGranularity,
    (size_t* granularity, const CUmemAllocationProp* properties, CUmemAllocationGranularity_flags option),
    (granularity, properties, option))
LLAMA_MOE_PASS_ON(
    cuMemMap,
    (CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags),
    (pointer, size, offset, handle, flags))
LLAMA_MOE_PASS_ON(cuMemRelease, (CUmemGenericAllocationHandle handle), (handle))
LLAMA_MOE_PASS_ON(
    cuMemSetAccess,
    (CUdeviceptr pointer, size_t size, const CUmemAccessDesc* access, size_t count),
    (pointer, size, access, count))
LLAMA_MOE_PASS_ON(cuMemUnmap, (CUdeviceptr pointer, size_t size), (pointer, size))

// ggml prints the text that it gets without a look at the result, so there must be one.
extern "C" CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
    static const auto driver_version = reinterpret_cast<decltype(&cuGetErrorString)>(driver_function(LLAMA_MOE_NAME(cuGetErrorString)));
    if (driver_version != nullptr) {
        return driver_version(error, text);
    }
    *text = "the NVIDIA driver's library, libcuda.so.1, could not be opened";
    return CUDA_SUCCESS;
}
