/* A CUDA driver without a device, preloaded under the name libcuda.so.1.
 *
 * autograd asks c10 for the number of devices, and torch asks the driver whether a device has an
 * active context. Nothing else of the driver is called while tensors are fake. */
static signed char devices = 0;

void set_device_count(int count) { devices = (signed char)count; }

/* c10::cuda::device_count() */
signed char _ZN3c104cuda12device_countEv(void) { return devices; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 0;
  return 0;
}
