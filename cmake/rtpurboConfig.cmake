# find_package(rtpurbo) for C++ programs: the target rtpurbo::rtpurbo, with headers <rtpurbo/ops/*.h> and LibTorch.
include("${CMAKE_CURRENT_LIST_DIR}/TorchTarget.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/rtpurboTargets.cmake")
