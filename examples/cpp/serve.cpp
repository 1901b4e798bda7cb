// Serves an adapted model from C++, without Python: a package that AOTInductor made (package.py)
// finds the operators in libc3a_cpu.so, which is loaded first.
//
//   serve <site-packages>/c3a/libc3a_cpu.so model.pt2

#include <ATen/ATen.h>
#include <ATen/DynamicLibrary.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iomanip>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: serve libc3a_cpu.so model.pt2\n";
    return 2;
  }
  const at::DynamicLibrary library(argv[1]);
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  for (const int64_t batch : {1, 5}) {
    const at::Tensor y = model.run({at::ones({batch, 64})}).at(0);
    std::cout << y.sizes() << std::fixed << std::setprecision(4);
    for (const int64_t feature : {0, 1, 31}) {
      std::cout << " " << y[batch - 1][feature].item<float>();
    }
    std::cout << "\n";
  }
}
