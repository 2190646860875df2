# Decides whether CUDA kernels are built and says so: sets KFAC_WITH_CUDA and enables the language.

set(KFAC_WITH_CUDA OFF)

# the pip packages nvidia-cuda-nvcc and nvidia-cuda-cccl bring an nvcc too, beside the libraries of this Python
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(KFAC_NVCC nvcc PATHS /usr/local/cuda/bin "${site_packages}/nvidia/cu13/bin"
               DOC "The CUDA compiler; CMAKE_CUDA_COMPILER or CUDACXX take precedence")
endif()

if(NOT KFAC_CUDA)
  if(KFAC_NVCC)
    message(STATUS "CUDA kernels: off; ${KFAC_NVCC} is here, KFAC_CUDA=1 compiles them in some minutes more")
  else()
    message(STATUS "CUDA kernels: off; KFAC_CUDA=1 compiles them, with an nvcc")
  endif()
  return()
endif()
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  if(NOT KFAC_NVCC)
    message(FATAL_ERROR
            "KFAC_CUDA=1: no nvcc found; install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`")
  endif()
  set(ENV{CUDACXX} "${KFAC_NVCC}")
endif()

# machine code of Ampere and of the newest, whose PTX later GPUs compile for themselves
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
# static, so that the module loads on machines without CUDA and beside any version that torch brings
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(KFAC_WITH_CUDA ON)
message(STATUS "CUDA kernels: on, ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} "
               "for ${CMAKE_CUDA_ARCHITECTURES} (KFAC_CUDA_ARCHITECTURES chooses others), some minutes")
