//! When requests are to come: the stages of a run, each with so many callers who wait for their answers (closed loop), or
//! with arrivals that do not care whether earlier ones were answered (open loop, a Poisson process whose rate may change).
//! Pure: time is a number.

use std::f64::consts::TAU;
use std::time::Duration;

use clap::ValueEnum;

use super::prompt_mix::Rng;

/// One stretch of a run, reported by itself.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stage {
    pub(crate) name: String,
    pub(crate) load: Load,
    pub(crate) end: End,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Load {
    /// So many callers, each with its next request when it has its answer.
    Closed(usize),
    /// Arrivals by themselves.
    Open(Rate),
}

/// What ends a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum End {
    Requests(u64),
    After(Duration),
}

/// Arrivals a second, over the time of a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    pub(crate) shape: Shape,
    /// The highest.
    pub(crate) peak: f64,
    /// Of one wave, or of one rise and fall.
    pub(crate) period: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Shape {
    Steady,
    /// From a twentieth to the peak and back, along straight lines.
    Spike,
    /// A sine between two thirds and the whole of the peak: a fifth to either side of the middle.
    Wave,
}

impl Rate {
    pub(crate) fn steady(peak: f64) -> Rate {
        Rate { shape: Shape::Steady, peak, period: Duration::from_secs(1) }
    }

    /// Arrivals a second at `at` seconds.
    pub(crate) fn at(&self, at: f64) -> f64 {
        let phase = (at / self.period.as_secs_f64()).fract();
        match self.shape {
            Shape::Steady => self.peak,
            Shape::Spike => self.peak * (0.05 + 0.95 * (1.0 - (2.0 * phase - 1.0).abs())),
            Shape::Wave => self.peak * (5.0 + (TAU * phase).sin()) / 6.0,
        }
    }

    /// The next arrival after `at`, seconds, of a Poisson process of this rate: one of the peak's rate, of which each
    /// arrival is kept with the share that the rate has then (Lewis and Shedler 1979, "thinning").
    pub(crate) fn next_arrival(&self, mut at: f64, rng: &mut Rng) -> f64 {
        loop {
            at -= (1.0 - rng.unit()).ln() / self.peak;
            if rng.unit() * self.peak < self.at(at) {
                return at;
            }
        }
    }
}

/// Loads with a name, for a gateway of ten thousand requests a second; each can be had smaller and shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Profile {
    /// 30 minutes at 1,000 requests a second
    Baseline,
    /// 4 hours at 10,000 requests a second
    Sustained,
    /// 1 hour from 1,000 to 20,000 requests a second and back, every 5 minutes
    Spike,
    /// 24 hours at 8,000 requests a second, a fifth more and less every hour
    Soak,
}

impl Profile {
    /// Its stage; with another highest rate, or another length, to which the waves shrink.
    pub(crate) fn stage(self, peak: Option<f64>, length: Option<Duration>) -> Stage {
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        let (name, shape, own_peak, own_length, period) = match self {
            Profile::Baseline => ("baseline", Shape::Steady, 1_000.0, minutes(30), minutes(30)),
            Profile::Sustained => ("sustained", Shape::Steady, 10_000.0, minutes(4 * 60), minutes(60)),
            Profile::Spike => ("spike", Shape::Spike, 20_000.0, minutes(60), minutes(5)),
            Profile::Soak => ("soak", Shape::Wave, 9_600.0, minutes(24 * 60), minutes(60)),
        };
        let length = length.unwrap_or(own_length);
        let period = period.mul_f64(length.as_secs_f64() / own_length.as_secs_f64());
        let rate = Rate { shape, peak: peak.unwrap_or(own_peak), period };
        Stage { name: name.to_string(), load: Load::Open(rate), end: End::After(length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arrivals of a second: as many as the rate says, also where it changes, and spread as a Poisson process's are (the
    /// variance of the counts is their mean).
    #[test]
    fn arrivals_follow_their_rate() {
        for profile in [Profile::Baseline, Profile::Spike, Profile::Soak] {
            let Stage { load: Load::Open(rate), .. } = profile.stage(Some(100.0), Some(Duration::from_secs(1_200)))
            else {
                panic!("profiles are open loops")
            };
            let (mut rng, mut at) = (Rng(1), 0.0);
            let mut counts = vec![0_u32; 1_200];
            loop {
                at = rate.next_arrival(at, &mut rng);
                let Some(count) = counts.get_mut(at as usize) else { break };
                *count += 1;
            }
            let expected: f64 = (0..1_200).map(|second| rate.at(f64::from(second) + 0.5)).sum();
            let total: f64 = counts.iter().copied().map(f64::from).sum();
            assert!((total / expected - 1.0).abs() < 0.02, "{profile:?}: {total} of {expected}");
            let deviations = counts.iter().enumerate().map(|(second, &count)| {
                let expected = rate.at(second as f64 + 0.5);
                (f64::from(count) - expected).powi(2) / expected
            });
            let dispersion = deviations.sum::<f64>() / 1_200.0;
            assert!((0.85..1.15).contains(&dispersion), "{profile:?}: {dispersion}");
        }
    }

    /// The profiles have the rates of their names, whole and short.
    #[test]
    fn profiles_have_their_rates() {
        for (profile, low, high) in [
            (Profile::Baseline, 1_000.0, 1_000.0),
            (Profile::Sustained, 10_000.0, 10_000.0),
            (Profile::Spike, 1_000.0, 20_000.0),
            (Profile::Soak, 6_400.0, 9_600.0),
        ] {
            for length in [None, Some(Duration::from_secs(10))] {
                let stage = profile.stage(None, length);
                let (Load::Open(rate), End::After(length)) = (stage.load, stage.end) else { panic!("{stage:?}") };
                let rates: Vec<f64> =
                    (0..=12_000).map(|i| rate.at(length.as_secs_f64() * f64::from(i) / 12e3)).collect();
                let (least, most) = rates.iter().fold((f64::MAX, 0.0_f64), |(a, b), &rate| (a.min(rate), b.max(rate)));
                assert!(
                    (least / low - 1.0).abs() < 0.01 && (most / high - 1.0).abs() < 0.01,
                    "{profile:?} {least} {most}"
                );
            }
        }
    }
}
