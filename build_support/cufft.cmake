# cufft.h comes with the toolkit, or with the wheel nvidia-cufft that a CUDA torch brings along.
find_path(C3A_CUFFT_INCLUDE cufft.h
  HINTS "${C3A_TORCH_ROOT}/../nvidia/cu13/include" "${C3A_TORCH_ROOT}/../nvidia/cufft/include"
        /usr/local/cuda/include
  PATH_SUFFIXES targets/x86_64-linux/include)
