// A libcuda that answers from the environment, for machines without a GPU:
//   FAKE_CUDA_NAME, FAKE_CUDA_SM (87), FAKE_CUDA_MEMORY and FAKE_CUDA_FREE (bytes), FAKE_CUDA_DRIVER (13020),
//   FAKE_CUDA_COUNT (devices), FAKE_CUDA_INTEGRATED (0 or 1),
//   FAKE_CUDA_FAIL=FUNCTION:CODE lets one function fail with a CUresult; FUNCTION:CODE:N, the one call after N.
// Memory is the host's, filled with 0xFF (NaN) when it is fresh; a stream does its work at once, or records it.
// FAKE_CUDA_MOST (bytes) is what may be allocated in all.
// A context that is pushed, popped or released out of order is an error, as it would be in the real one.
#include <stdlib.h>
#include <stdio.h>
#include <string.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_CONTEXT = 201,
    CAPTURE_UNSUPPORTED = 900 };

static int initialised, retained, pushed, stream;
static size_t allocated;

static long long number(char const* name, long long otherwise)
{
    char const* text = getenv(name);
    return text ? atoll(text) : otherwise;
}

static int outcome(char const* function)
{
    char const* fail = getenv("FAKE_CUDA_FAIL");
    size_t const length = strlen(function);
    static long long calls;
    if (fail && !strncmp(fail, function, length) && fail[length] == ':')
    {
        char* end;
        int const code = (int) strtol(fail + length + 1, &end, 10);
        return *end != ':' || calls++ == atoll(end + 1) ? code : 0;
    }
    return 0;
}

static int usable(char const* function)
{
    int const failed = outcome(function);
    return failed ? failed : initialised ? 0 : NOT_INITIALIZED;
}

int cuInit(unsigned flags)
{
    int const failed = outcome("cuInit");
    initialised = !failed && !flags;
    return failed;
}

int cuDriverGetVersion(int* version)
{
    *version = (int) number("FAKE_CUDA_DRIVER", 13020);
    return outcome("cuDriverGetVersion");
}

int cuGetErrorString(int error, char const** text)
{
    *text = error == NO_DEVICE ? "no CUDA-capable device is detected"
        : error == OUT_OF_MEMORY ? "out of memory" : error == 999 ? "unknown error" : NULL;
    return *text ? 0 : 1;
}

int cuDeviceGetCount(int* count)
{
    *count = (int) number("FAKE_CUDA_COUNT", 1);
    return usable("cuDeviceGetCount");
}

int cuDeviceGet(int* device, int ordinal)
{
    *device = ordinal;
    return usable("cuDeviceGet");
}

int cuDeviceGetName(char* name, int length, int device)
{
    char const* text = getenv("FAKE_CUDA_NAME");
    (void) device;
    snprintf(name, (size_t) length, "%s", text ? text : "Orin");
    return usable("cuDeviceGetName");
}

int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    int const sm = (int) number("FAKE_CUDA_SM", 87);
    (void) device;
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : attribute == 18
            ? (int) number("FAKE_CUDA_INTEGRATED", 0) : -1;
    return usable("cuDeviceGetAttribute");
}

int cuDeviceTotalMem_v2(size_t* bytes, int device)
{
    (void) device;
    *bytes = (size_t) number("FAKE_CUDA_MEMORY", 8000000000);
    return usable("cuDeviceTotalMem_v2");
}

int cuDevicePrimaryCtxRetain(void** context, int device)
{
    int const failed = usable("cuDevicePrimaryCtxRetain");
    (void) device;
    *context = &retained;
    retained += !failed;
    return failed;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    (void) device;
    return retained-- > 0 && !pushed ? 0 : INVALID_CONTEXT;
}

int cuCtxPushCurrent_v2(void* context)
{
    if (context != &retained || !retained)
    {
        return INVALID_CONTEXT;
    }
    ++pushed;
    return 0;
}

int cuCtxPopCurrent_v2(void** context)
{
    *context = &retained;
    return pushed-- > 0 ? 0 : INVALID_CONTEXT;
}

int cuMemGetInfo_v2(size_t* free_bytes, size_t* total)
{
    *total = (size_t) number("FAKE_CUDA_MEMORY", 8000000000);
    *free_bytes = (size_t) number("FAKE_CUDA_FREE", 5000000000) - allocated;
    return pushed ? outcome("cuMemGetInfo_v2") : INVALID_CONTEXT;
}

// Every piece keeps its size in front of it. HEADER is the alignment, too, that of the real one.
enum { HEADER = 256 };

int cuMemAlloc_v2(unsigned long long* address, size_t bytes)
{
    int const failed = !pushed ? INVALID_CONTEXT : !bytes ? INVALID_VALUE : outcome("cuMemAlloc_v2");
    if (failed)
    {
        return failed;
    }
    if (allocated + bytes > (size_t) number("FAKE_CUDA_MOST", 1LL << 40))
    {
        return OUT_OF_MEMORY;
    }
    char* piece = aligned_alloc(HEADER, (HEADER + bytes + HEADER - 1) / HEADER * HEADER);
    memcpy(piece, &bytes, sizeof bytes);
    memset(piece + HEADER, 0xFF, bytes);
    allocated += bytes;
    *address = (unsigned long long) (piece + HEADER);
    return 0;
}

int cuMemFree_v2(unsigned long long address)
{
    char* piece = (char*) address - HEADER;
    size_t bytes;
    memcpy(&bytes, piece, sizeof bytes);
    memset(piece + HEADER, 0xFF, bytes);
    allocated -= bytes;
    free(piece);
    return pushed ? 0 : INVALID_CONTEXT;
}

int cuStreamCreate(void** created, unsigned flags)
{
    (void) flags;
    *created = &stream;
    return pushed ? outcome("cuStreamCreate") : INVALID_CONTEXT;
}

int cuStreamDestroy_v2(void* destroyed)
{
    return destroyed == &stream ? 0 : INVALID_VALUE;
}

int cuStreamSynchronize(void* waited)
{
    return waited == &stream && pushed ? outcome("cuStreamSynchronize") : INVALID_VALUE;
}

// Work that a stream is given: recorded while it captures, else done at once.
typedef struct Work
{
    void (*run)(void*);
    void (*release)(void*);
    void* argument;
    struct Work* next;
} Work;

static Work* captured;
static Work** captured_end;
static int capturing, failed_capture, graphs;

static int usable_stream(void const* on)
{
    int const failed = !pushed || on != &stream ? INVALID_CONTEXT : 0;
    // None of the copies below is meant to be recorded.
    failed_capture |= capturing;
    return failed ? failed : capturing ? CAPTURE_UNSUPPORTED : 0;
}

int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t bytes, void* on)
{
    int const failed = usable_stream(on);
    if (!failed)
    {
        memset((void*) address, value, bytes);
    }
    return failed ? failed : outcome("cuMemsetD8Async");
}

int cuMemcpyHtoDAsync_v2(unsigned long long target, void const* source, size_t bytes, void* on)
{
    int const failed = usable_stream(on);
    if (!failed)
    {
        memcpy((void*) target, source, bytes);
    }
    return failed ? failed : outcome("cuMemcpyHtoDAsync_v2");
}

int cuMemcpyDtoHAsync_v2(void* target, unsigned long long source, size_t bytes, void* on)
{
    int const failed = usable_stream(on);
    if (!failed)
    {
        memcpy(target, (void const*) source, bytes);
    }
    return failed ? failed : outcome("cuMemcpyDtoHAsync_v2");
}

//! What a fake TensorRT calls in place of launching kernels; `release` frees the argument.
void fakeCudaEnqueue(void (*run)(void*), void (*release)(void*), void* argument)
{
    if (!capturing)
    {
        run(argument);
        release(argument);
        return;
    }
    Work* work = malloc(sizeof *work);
    *work = (Work) {run, release, argument, NULL};
    *captured_end = work;
    captured_end = &work->next;
}

static void free_work(Work* work)
{
    while (work)
    {
        Work* const next = work->next;
        work->release(work->argument);
        free(work);
        work = next;
    }
}

int cuStreamBeginCapture_v2(void* on, int mode)
{
    int const failed = mode < 0 || mode > 2 ? INVALID_VALUE : usable_stream(on);
    int const injected = failed ? failed : outcome("cuStreamBeginCapture_v2");
    capturing = !injected;
    failed_capture = 0;
    captured = NULL;
    captured_end = &captured;
    return injected;
}

int cuStreamEndCapture(void* on, void** graph)
{
    int const failed = on != &stream || !capturing ? INVALID_VALUE
        : failed_capture ? CAPTURE_UNSUPPORTED : outcome("cuStreamEndCapture");
    capturing = 0;
    *graph = NULL;
    if (failed)
    {
        free_work(captured);
        return failed;
    }
    Work** held = malloc(sizeof *held);
    *held = captured;
    *graph = held;
    ++graphs;
    return 0;
}

// An executable graph takes over the work of the one it is made of, which keeps none.
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long flags)
{
    int const failed = flags ? INVALID_VALUE : outcome("cuGraphInstantiateWithFlags");
    *exec = NULL;
    if (!failed)
    {
        Work** held = malloc(sizeof *held);
        *held = *(Work**) graph;
        *(Work**) graph = NULL;
        *exec = held;
        ++graphs;
    }
    return failed;
}

int cuGraphLaunch(void* exec, void* on)
{
    int const failed = usable_stream(on);
    int const injected = failed ? failed : outcome("cuGraphLaunch");
    for (Work* work = injected ? NULL : *(Work**) exec; work; work = work->next)
    {
        work->run(work->argument);
    }
    return injected;
}

int cuGraphDestroy(void* graph)
{
    free_work(*(Work**) graph);
    free(graph);
    --graphs;
    return pushed ? 0 : INVALID_CONTEXT;
}

int cuGraphExecDestroy(void* exec)
{
    return cuGraphDestroy(exec);
}

//! What a test asks: graphs that were not destroyed.
int fakeCudaGraphsLeft(void)
{
    return graphs;
}

//! What a test asks: memory that is in use.
size_t fakeCudaAllocated(void)
{
    return allocated;
}

//! What a test asks: whether a context was left behind.
int fakeCudaContextsLeft(void)
{
    return retained + pushed;
}
