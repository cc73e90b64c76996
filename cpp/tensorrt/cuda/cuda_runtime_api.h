// All that TensorRT's headers take of the CUDA runtime: two names of types of the driver's. The runtime itself is not
// used, and its headers need not be installed.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
