# An adapter for each TensorRT whose headers are there. Which one headers are for, their version tells.
#   EDGEATTN_TENSORRT_INCLUDE: folders with NvInferRuntime.h, where they are not among the system's.
find_path(EDGEATTN_SYSTEM_TENSORRT_INCLUDE NvInferRuntime.h
  PATHS /usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu /usr/include
  NO_CMAKE_FIND_ROOT_PATH)
set(folders ${EDGEATTN_TENSORRT_INCLUDE})
if(NOT folders AND DEFINED ENV{EDGEATTN_TENSORRT_INCLUDE})
  set(folders $ENV{EDGEATTN_TENSORRT_INCLUDE})
endif()
if(NOT folders AND EDGEATTN_SYSTEM_TENSORRT_INCLUDE)
  set(folders ${EDGEATTN_SYSTEM_TENSORRT_INCLUDE})
endif()

# name: of the adapter. library, major, title: of TensorRT's library. headers: major of the headers.
function(edgeattn_adapter name library major title headers folder)
  find_path(EDGEATTN_CUDA_INCLUDE cuda_runtime_api.h
    HINTS ENV EDGEATTN_CUDA_INCLUDE PATHS /usr/local/cuda/include NO_CMAKE_FIND_ROOT_PATH)
  if(NOT EDGEATTN_CUDA_INCLUDE)
    message(FATAL_ERROR "expected CUDA's headers, which those of TensorRT include, but cuda_runtime_api.h was not "
                        "found: install CUDA or the wheels nvidia-cuda-runtime and nvidia-cuda-crt, or set "
                        "EDGEATTN_CUDA_INCLUDE")
  endif()
  if(TARGET edgeattn_${name})
    message(FATAL_ERROR "expected headers of one TensorRT ${major} for the adapter ${name}, but there are two: leave "
                        "${folder} out of EDGEATTN_TENSORRT_INCLUDE")
  endif()
  add_library(edgeattn_${name} MODULE adapter/tensorrt.cpp)
  edgeattn_options(edgeattn_${name})
  target_include_directories(edgeattn_${name} PRIVATE . ../include)
  target_include_directories(edgeattn_${name} SYSTEM PRIVATE ${folder} ${EDGEATTN_CUDA_INCLUDE})
  target_compile_definitions(edgeattn_${name} PRIVATE EDGEATTN_TENSORRT_LIBRARY="${library}"
    EDGEATTN_TENSORRT_MAJOR=${major} EDGEATTN_TENSORRT_TITLE="${title}" EDGEATTN_TENSORRT_HEADERS=${headers})
  target_link_libraries(edgeattn_${name} PRIVATE ${CMAKE_DL_LIBS})
  target_link_options(edgeattn_${name} PRIVATE -Wl,--as-needed -Wl,-z,defs)
  install(TARGETS edgeattn_${name} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  message(STATUS "edgeattn: adapter ${name} (${title} ${major}) from ${folder}")
endfunction()

foreach(folder ${folders})
  if(NOT EXISTS "${folder}/NvInferVersion.h")
    message(FATAL_ERROR "expected TensorRT's headers in ${folder}, but there is no NvInferVersion.h: correct "
                        "EDGEATTN_TENSORRT_INCLUDE")
  endif()
  file(READ "${folder}/NvInferVersion.h" version)
  set(enterprise OFF)
  if(version MATCHES "define (TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (10|11)")
    set(enterprise ${CMAKE_MATCH_2})
  endif()
  if(enterprise)
    edgeattn_adapter(trt${enterprise} libnvinfer.so.${enterprise} ${enterprise} TensorRT ${enterprise} ${folder})
    set(folder_of_${enterprise} ${folder})
  elseif(version MATCHES "define TRT_MAJOR_RTX ([0-9]+)")
    edgeattn_adapter(rtx libtensorrt_rtx.so.1 1 TensorRT-RTX ${CMAKE_MATCH_1} ${folder})
  else()
    message(FATAL_ERROR "expected headers of TensorRT 10 or 11, or of TensorRT-RTX, but those in ${folder} are of "
                        "another: correct EDGEATTN_TENSORRT_INCLUDE")
  endif()
endforeach()
# Classes of TensorRT-RTX have the layout of TensorRT 11 (measured with 11.1 and TensorRT-RTX 1.7).
if(folder_of_11 AND NOT TARGET edgeattn_rtx)
  edgeattn_adapter(rtx libtensorrt_rtx.so.1 1 TensorRT-RTX 11 ${folder_of_11})
endif()
