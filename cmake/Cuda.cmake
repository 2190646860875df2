# Decides whether CUDA kernels are built and says so: sets KFAC_WITH_CUDA and enables the language.

set(KFAC_WITH_CUDA OFF)
if(NOT KFAC_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KFAC_CUDA is '${KFAC_CUDA}', expected AUTO, ON or OFF")
endif()
if(KFAC_CUDA STREQUAL "OFF")
  message(STATUS "CUDA kernels: off (KFAC_CUDA=OFF)")
  return()
endif()

# Where a compiler is named it has to work; one that is found by chance may be too old for the host's compiler.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  # the pip packages nvidia-cuda-nvcc and nvidia-cuda-cccl bring an nvcc too, beside the libraries of this Python
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
    OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_program(KFAC_NVCC nvcc PATHS /usr/local/cuda/bin "${site_packages}/nvidia/cu13/bin"
               DOC "The CUDA compiler; CMAKE_CUDA_COMPILER or CUDACXX take precedence")
  if(KFAC_NVCC)
    set(ENV{CUDACXX} "${KFAC_NVCC}")
    if(KFAC_CUDA STREQUAL "AUTO")
      include(CheckLanguage)
      check_language(CUDA)
    endif()
  endif()
  if(NOT KFAC_NVCC OR (KFAC_CUDA STREQUAL "AUTO" AND NOT CMAKE_CUDA_COMPILER))
    if(KFAC_NVCC)
      set(why "${KFAC_NVCC} does not work here, `KFAC_CUDA=ON` shows why")
    else()
      set(why "no nvcc found; install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`")
    endif()
    if(KFAC_CUDA STREQUAL "ON")
      message(FATAL_ERROR "KFAC_CUDA=ON: ${why}")
    endif()
    message(STATUS "CUDA kernels: off (KFAC_CUDA=AUTO: ${why})")
    return()
  endif()
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
               "for ${CMAKE_CUDA_ARCHITECTURES} (KFAC_CUDA=${KFAC_CUDA})")
