#pragma once
/// @file
/// The mathematics of studies: bounds, fits, noise scales, spectra. No MPI, no clock, no file.

#include <orthrus/studies/cells.hpp>
#include <orthrus/studies/fit.hpp>
#include <orthrus/studies/horizon.hpp>
#include <orthrus/studies/loggp.hpp>
#include <orthrus/studies/noise.hpp>
#include <orthrus/studies/ramp.hpp>
#include <orthrus/studies/smoothness.hpp>
#include <orthrus/studies/spectrum.hpp>
#include <orthrus/studies/theory.hpp>
#include <orthrus/studies/tuning.hpp>
