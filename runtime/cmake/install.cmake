# What an installed Orthrus is found by: a CMake package and a pkg-config file. Included last from the root.
include(CMakePackageConfigHelpers)
add_library(Orthrus::orthrus ALIAS orthrus_runtime)

set(orthrus_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/Orthrus)
install(EXPORT OrthrusTargets NAMESPACE Orthrus:: DESTINATION ${orthrus_package_dir})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/OrthrusConfig.cmake.in
  ${PROJECT_BINARY_DIR}/OrthrusConfig.cmake INSTALL_DESTINATION ${orthrus_package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/OrthrusConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/OrthrusConfig.cmake ${PROJECT_BINARY_DIR}/OrthrusConfigVersion.cmake
  DESTINATION ${orthrus_package_dir})

# pkg-config: all that a static link needs, by the paths the build found (an MPI has no one name there).
set(orthrus_pc_cflags "")
foreach(dir IN LISTS MPI_CXX_INCLUDE_DIRS)
  string(APPEND orthrus_pc_cflags " -I${dir}")
endforeach()
foreach(definition IN LISTS MPI_CXX_COMPILE_DEFINITIONS)
  string(APPEND orthrus_pc_cflags " -D${definition}")
endforeach()
set(orthrus_cuda_libraries "")
if(ORTHRUS_WITH_NCCL)
  list(APPEND orthrus_cuda_libraries ${ORTHRUS_NCCL_LIBRARY})
endif()
if(ORTHRUS_WITH_CUDA)
  list(APPEND orthrus_cuda_libraries ${ORTHRUS_CUDA_LIBRARIES} -ldl -lrt)
endif()
set(orthrus_pc_private "-lyaml-cpp -lcrypto")
foreach(library IN LISTS ORTHRUS_XXHASH ORTHRUS_SCALAPACK_LIBRARY ORTHRUS_CBLAS_LIBRARY ORTHRUS_ONEDNN_LIBRARY
        ORTHRUS_OPENMP_LIBRARY
        orthrus_cuda_libraries MPI_CXX_LIBRARIES)
  if(library)
    string(APPEND orthrus_pc_private " ${library}")
  endif()
endforeach()
string(APPEND orthrus_pc_private " -lpthread")
string(STRIP "${orthrus_pc_cflags}" orthrus_pc_cflags)

# The prefix may be chosen as late as `cmake --install --prefix`, so the file is written then.
set(orthrus_pc_in ${CMAKE_CURRENT_LIST_DIR}/orthrus.pc.in)
set(orthrus_pc_out ${PROJECT_BINARY_DIR}/orthrus.pc)
install(CODE "
  set(CMAKE_INSTALL_LIBDIR \"${CMAKE_INSTALL_LIBDIR}\")
  set(CMAKE_INSTALL_INCLUDEDIR \"${CMAKE_INSTALL_INCLUDEDIR}\")
  set(PROJECT_DESCRIPTION \"${PROJECT_DESCRIPTION}\")
  set(PROJECT_VERSION \"${PROJECT_VERSION}\")
  set(orthrus_pc_cflags \"${orthrus_pc_cflags}\")
  set(orthrus_pc_private \"${orthrus_pc_private}\")
  configure_file(\"${orthrus_pc_in}\" \"${orthrus_pc_out}\" @ONLY)")
install(FILES ${orthrus_pc_out} DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(ORTHRUS_BUILD_EXAMPLES)
  add_subdirectory(${PROJECT_SOURCE_DIR}/runtime/examples/cpp_trainer)
  add_subdirectory(${PROJECT_SOURCE_DIR}/runtime/examples/codes_trainer)
endif()
