//! Which GPUs are in this machine, and how busy they are: NVIDIA's through NVML, AMD's through sysfs. For those who watch
//! a machine; nothing here decides where the engine computes. No process is started, no driver is needed: without a
//! library or a device the list is empty, and a value that a device does not tell is `None`.
//!
//! A first call may load the driver's library and wake a sleeping device, which takes up to seconds: call it where
//! waiting is allowed.

use std::path::Path;
use std::sync::OnceLock;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;

/// Devices looked at, of each maker: a machine with more is no machine but a mistake.
const MAX_DEVICES: u32 = 64;
/// Where Linux lists graphics devices.
const DRM_CLASS: &str = "/sys/class/drm";
/// AMD's PCI vendor number, as sysfs writes it.
const AMD_VENDOR_ID: &str = "0x1002";

/// Who made a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuVendor {
    /// NVIDIA.
    Nvidia,
    /// AMD.
    Amd,
}

/// One device, at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpu {
    /// Who made it.
    pub vendor: GpuVendor,
    /// Its number among the devices of this list.
    pub index: usize,
    /// As the driver calls it.
    pub name: String,
    /// Memory of the device; integrated devices have none of their own.
    pub memory_total_bytes: Option<u64>,
    /// The part of it that is in use, by whichever process.
    pub memory_used_bytes: Option<u64>,
    /// Share of the last sampling period in which it computed, 0 to 100.
    pub utilization_percent: Option<f64>,
    /// Temperature of the chip.
    pub temperature_celsius: Option<f64>,
    /// Power that it draws.
    pub power_watts: Option<f64>,
    /// CUDA compute capability, major and minor.
    pub compute_capability: Option<(u32, u32)>,
}

/// The GPUs of this machine, NVIDIA's first. Empty without any.
pub fn gpus() -> Vec<Gpu> {
    let mut gpus = nvml().map_or_else(Vec::new, nvidia_gpus);
    gpus.extend(amd_gpus(Path::new(DRM_CLASS)));
    for (index, gpu) in gpus.iter_mut().enumerate() {
        gpu.index = index;
    }
    gpus
}

/// NVML, opened once for the process: initialising it costs more than all questions. Without a driver it is looked for
/// at each call, so that one that is loaded later is found.
fn nvml() -> Option<&'static Nvml> {
    static NVML: OnceLock<Nvml> = OnceLock::new();
    if let Some(nvml) = NVML.get() {
        return Some(nvml);
    }
    let opened = Nvml::init().ok()?;
    Some(NVML.get_or_init(|| opened))
}

/// The NVIDIA devices that the library of this path tells of, opened for this look alone; `None` when it is no such
/// library, or has no driver below it. For tests.
#[doc(hidden)]
pub fn nvidia_gpus_of(library: &Path) -> Option<Vec<Gpu>> {
    let nvml = Nvml::builder().lib_path(library.as_os_str()).init().ok()?;
    Some(nvidia_gpus(&nvml))
}

fn nvidia_gpus(nvml: &Nvml) -> Vec<Gpu> {
    let num_devices = nvml.device_count().unwrap_or(0).min(MAX_DEVICES);
    let devices = (0..num_devices).filter_map(|index| nvml.device_by_index(index).ok());
    devices
        .map(|device| {
            // Each value is asked for by itself: MIG slices, integrated memory and old drivers refuse some of them.
            let memory = device.memory_info().ok();
            let capability = device.cuda_compute_capability().ok();
            Gpu {
                vendor: GpuVendor::Nvidia,
                index: 0,
                name: device.name().unwrap_or_else(|_| "NVIDIA GPU".into()),
                memory_total_bytes: memory.as_ref().map(|memory| memory.total),
                memory_used_bytes: memory.as_ref().map(|memory| memory.total.saturating_sub(memory.free)),
                utilization_percent: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu)),
                temperature_celsius: device.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
                power_watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3),
                compute_capability: capability
                    .and_then(|it| Some((u32::try_from(it.major).ok()?, u32::try_from(it.minor).ok()?))),
            }
        })
        .collect()
}

/// AMD's devices below `drm_class`: folders `card0`, `card1`, .. (connectors such as `card0-DP-1` are none).
fn amd_gpus(drm_class: &Path) -> Vec<Gpu> {
    let Ok(entries) = std::fs::read_dir(drm_class) else { return Vec::new() };
    let mut cards: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_prefix("card")?.parse().ok()).collect();
    cards.sort_unstable();
    let devices = cards.into_iter().take(MAX_DEVICES as usize);
    devices.filter_map(|card| amd_gpu(&drm_class.join(format!("card{card}")).join("device"))).collect()
}

/// The device of one card, as the `amdgpu` driver describes it; `None` when it is another maker's.
fn amd_gpu(device: &Path) -> Option<Gpu> {
    if text(&device.join("vendor"))? != AMD_VENDOR_ID {
        return None;
    }
    let sensors = sensors(device);
    let sensor = |name: &str| sensors.as_ref().and_then(|folder| number(&folder.join(name)));
    let product_id = || text(&device.join("device")).unwrap_or_default();
    Some(Gpu {
        vendor: GpuVendor::Amd,
        index: 0,
        name: text(&device.join("product_name"))
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| format!("AMD GPU {}", product_id()).trim_end().to_string()),
        memory_total_bytes: number(&device.join("mem_info_vram_total")),
        memory_used_bytes: number(&device.join("mem_info_vram_used")),
        utilization_percent: number(&device.join("gpu_busy_percent")).map(|percent| percent.min(100) as f64),
        temperature_celsius: sensor("temp1_input").map(|millidegrees| millidegrees as f64 / 1e3),
        // Newer kernels tell the momentary power, older ones an average.
        power_watts: sensor("power1_average")
            .or_else(|| sensor("power1_input"))
            .map(|microwatts| microwatts as f64 / 1e6),
        compute_capability: None,
    })
}

/// The one folder below `hwmon`; its number changes from boot to boot.
fn sensors(device: &Path) -> Option<std::path::PathBuf> {
    let entries = std::fs::read_dir(device.join("hwmon")).ok()?;
    entries.flatten().map(|entry| entry.path()).min()
}

fn text(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_string())
}

fn number(path: &Path) -> Option<u64> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A folder that looks like `/sys/class/drm`, removed at the end.
    struct FakeDrm(PathBuf);

    impl FakeDrm {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("ns-llm-drm-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("a temporary folder");
            FakeDrm(folder)
        }

        fn write(&self, file: &str, content: &str) {
            let path = self.0.join(file);
            std::fs::create_dir_all(path.parent().expect("inside")).expect("a folder");
            std::fs::write(path, content).expect("a file");
        }
    }

    impl Drop for FakeDrm {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// Cards of AMD are found among others, in the order of their numbers, and every file lands in its field and unit.
    #[test]
    fn amd_devices_are_read_from_sysfs() {
        let drm = FakeDrm::new("full");
        drm.write("card10/device/vendor", "0x1002\n");
        drm.write("card2/device/vendor", "0x1002\n");
        drm.write("card2/device/product_name", "Instinct MI210\n");
        drm.write("card2/device/mem_info_vram_total", "68702699520\n");
        drm.write("card2/device/mem_info_vram_used", "1048576\n");
        drm.write("card2/device/gpu_busy_percent", "37\n");
        drm.write("card2/device/hwmon/hwmon7/temp1_input", "41500\n");
        drm.write("card2/device/hwmon/hwmon7/power1_average", "52250000\n");
        drm.write("card0/device/vendor", "0x8086\n");
        drm.write("card2-DP-1/status", "connected\n");
        drm.write("version", "drm 1.1.0\n");
        let gpus = amd_gpus(&drm.0);
        assert_eq!(gpus.len(), 2, "{gpus:?}");
        let full = Gpu {
            vendor: GpuVendor::Amd,
            index: 0,
            name: "Instinct MI210".into(),
            memory_total_bytes: Some(68_702_699_520),
            memory_used_bytes: Some(1 << 20),
            utilization_percent: Some(37.0),
            temperature_celsius: Some(41.5),
            power_watts: Some(52.25),
            compute_capability: None,
        };
        assert_eq!(gpus[0], full);
        assert_eq!((gpus[1].name.as_str(), gpus[1].memory_total_bytes), ("AMD GPU", None));
    }

    /// A value that is not a number is not told; the device stays. Newer kernels have the momentary power only.
    #[test]
    fn odd_values_are_none_and_the_device_stays() {
        let drm = FakeDrm::new("odd");
        drm.write("card0/device/vendor", "0x1002");
        drm.write("card0/device/device", "0x744c\n");
        drm.write("card0/device/product_name", "\n");
        drm.write("card0/device/mem_info_vram_total", "many\n");
        drm.write("card0/device/gpu_busy_percent", "-1\n");
        drm.write("card0/device/hwmon/hwmon0/power1_input", "9000000\n");
        let [gpu] = amd_gpus(&drm.0).try_into().expect("one device");
        assert_eq!(gpu.name, "AMD GPU 0x744c");
        assert_eq!((gpu.memory_total_bytes, gpu.utilization_percent), (None, None));
        assert_eq!((gpu.temperature_celsius, gpu.power_watts), (None, Some(9.0)));
    }

    /// No folder, no driver: an empty list. On a machine with devices each has its own number, and sizes that fit.
    #[test]
    fn a_machine_without_devices_is_a_normal_case() {
        assert_eq!(amd_gpus(Path::new("/nonexistent/drm")), []);
        for (position, gpu) in gpus().iter().enumerate() {
            assert_eq!(gpu.index, position);
            assert!(gpu.memory_used_bytes <= gpu.memory_total_bytes, "{gpu:?}");
        }
    }
}
