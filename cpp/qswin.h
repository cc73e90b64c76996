/* Runs bundles (.qsb) of qswin on an NVIDIA GPU: no torch, no TensorRT, no CUDA runtime; of the driver, libcuda.so.1.

   A function that can fail returns a status, and leaves one line of text, for the calling thread, in qswin_error().
   Nothing here starts a capture, waits for a stream or allocates memory while work is enqueued: an enqueue may be
   captured as part of a CUDA graph. Handles may be used from any thread; see qswin_enqueue for what may run at the same
   time. */
#ifndef QSWIN_H
#define QSWIN_H

#include <stddef.h>
#include <stdint.h>

#define QSWIN_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  QSWIN_OK = 0,
  QSWIN_BAD_FILE = 1,      /* not a bundle, of another version, cut off or changed, or it cannot be read */
  QSWIN_BAD_ARGUMENT = 2,  /* a null pointer, an address that is not aligned, a batch that the bundle does not hold */
  QSWIN_NO_DRIVER = 3,     /* no NVIDIA driver, no such device, or a driver that is too old */
  QSWIN_UNSUPPORTED = 4,   /* the bundle holds no code for this GPU */
  QSWIN_OUT_OF_MEMORY = 5, /* of the GPU or of the host */
  QSWIN_CUDA_ERROR = 6     /* the driver reports an error */
} qswin_status;

typedef struct qswin_bundle qswin_bundle;   /* code and weights on a GPU */
typedef struct qswin_context qswin_context; /* a workspace for a batch size */

typedef struct {
  uint32_t channels, height, width; /* of an image */
  uint32_t classes;                 /* logits of an image */
  uint32_t architecture;            /* whose code is run: 80 of compute capability 8.0 */
  uint32_t batch_count;
  const uint32_t* batches; /* the batch sizes, in ascending order; as long as the bundle is open */
} qswin_info;

/* What the calling thread's last failed call says. It is never NULL. */
QSWIN_API const char* qswin_error(void);

/* Checks a bundle's bytes, all checksums and bounds. It needs no GPU and no driver. */
QSWIN_API qswin_status qswin_check(const void* data, size_t size);

/* Loads a bundle's code and weights, on the device's primary context. The bytes are not needed afterwards. */
QSWIN_API qswin_status qswin_open(const void* data, size_t size, int device, qswin_bundle** bundle);
QSWIN_API qswin_status qswin_open_file(const char* path, int device, qswin_bundle** bundle);

QSWIN_API qswin_status qswin_get_info(const qswin_bundle* bundle, qswin_info* info);

/* Allocates the workspace of a batch size, in one piece. */
QSWIN_API qswin_status qswin_create_context(qswin_bundle* bundle, uint32_t batch, qswin_context** context);

/* Puts an inference on a stream, a CUstream or cudaStream_t of the device's primary context.

   input: batch x channels x height x width float32, output: batch x classes float32, both on the device, at addresses
   that are multiples of 16. A context is for one inference at a time; contexts of a bundle may run on several streams.
 */
QSWIN_API qswin_status qswin_enqueue(const qswin_context* context, void* stream, const void* input, void* output);

/* The same in a workspace of the caller's: qswin_workspace_size bytes on the device, for one inference at a time. */
QSWIN_API qswin_status qswin_workspace_size(const qswin_bundle* bundle, uint32_t batch, size_t* size);
QSWIN_API qswin_status qswin_enqueue_in(const qswin_bundle* bundle, uint32_t batch, void* workspace, void* stream,
                                        const void* input, void* output);

/* Free what the handle holds; NULL is ignored. What was enqueued must have ended. Contexts may outlive their bundle. */
QSWIN_API void qswin_destroy_context(qswin_context* context);
QSWIN_API void qswin_close(qswin_bundle* bundle);

#ifdef __cplusplus
}
#endif
#endif
