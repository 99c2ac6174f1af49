//! `ns-llm cache`: looking after a directory in which KV blocks outlive the process.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use ns_llm::kv_cache_directory::{self, Contents, PruneLimits, Removed};
use serde_json::json;

use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Subcommand)]
enum CacheCommand {
    /// Show what is in the directory; may be used while an engine writes to it
    Stat(Place),
    /// Read every record and check it; fails when something is damaged. May be used while an engine writes
    Verify(Place),
    /// Remove the oldest files
    Prune(PruneOptions),
    /// Remove all KV
    Clear(Place),
}

#[derive(Args)]
struct Place {
    /// The directory, as an engine was given it
    #[arg(long, value_name = "DIR")]
    kv_cache_dir: PathBuf,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = true, args = ["max_mib", "max_age_hours"])]
struct PruneOptions {
    #[command(flatten)]
    place: Place,
    /// Remove the oldest until the rest takes at most this many MiB
    #[arg(long, value_name = "N")]
    max_mib: Option<u64>,
    /// Remove what was written longer ago than this many hours
    #[arg(long, value_name = "N")]
    max_age_hours: Option<u64>,
}

pub(crate) fn run(options: Options) -> CommandResult {
    match options.command {
        CacheCommand::Stat(place) => show_contents(&place, &kv_cache_directory::stat(&place.kv_cache_dir)?),
        CacheCommand::Verify(place) => {
            let contents = kv_cache_directory::verify(&place.kv_cache_dir)?;
            show_contents(&place, &contents)?;
            match contents.damaged {
                0 => Ok(()),
                damaged => Err(format!("{damaged} damaged places in {}", place.kv_cache_dir.display()).into()),
            }
        }
        CacheCommand::Prune(PruneOptions { place, max_mib, max_age_hours }) => {
            let limits = PruneLimits {
                max_bytes: max_mib.map(|mib| mib.saturating_mul(1 << 20)),
                max_age: max_age_hours.map(|hours| Duration::from_secs(hours.saturating_mul(3_600))),
            };
            show_removed(&place, &kv_cache_directory::prune(&place.kv_cache_dir, limits)?)
        }
        CacheCommand::Clear(place) => show_removed(&place, &kv_cache_directory::clear(&place.kv_cache_dir)?),
    }
}

fn show_contents(place: &Place, contents: &Contents) -> CommandResult {
    let Contents {
        format_version,
        has_writer,
        segments,
        bytes,
        records,
        live,
        payload_bytes,
        damaged,
        damage,
        torn_bytes,
        other_versions,
        other_version_bytes,
    } = contents;
    if place.json {
        let places: Vec<_> = damage
            .iter()
            .map(|place| json!({ "file": place.file, "offset": place.offset, "reason": place.reason }))
            .collect();
        let object = json!({
            "format_version": format_version,
            "has_writer": has_writer,
            "segments": segments,
            "bytes": bytes,
            "records": records,
            "live": live,
            "payload_bytes": payload_bytes,
            "damaged": damaged,
            "damage": places,
            "torn_bytes": torn_bytes,
            "other_versions": other_versions,
            "other_version_bytes": other_version_bytes,
        });
        show(format_args!("{object}\n"))?;
        return Ok(());
    }
    let mut text = format!(
        "blocks     {live} in {records} records, {} of KV\n\
         files      {segments} segments of format {format_version}, {}\n\
         writer     {}\n\
         damaged    {damaged}\n",
        mib(*payload_bytes),
        mib(*bytes),
        if *has_writer { "an engine has the directory open" } else { "none" },
    );
    if *torn_bytes > 0 {
        text += &format!("unfinished {torn_bytes} bytes, which the next opening cuts off\n");
    }
    if *other_versions > 0 {
        text += &format!("others     {other_versions} segments of other formats, {}\n", mib(*other_version_bytes));
    }
    for place in damage {
        text += &format!("  {} at byte {}: {}\n", place.file, place.offset, place.reason);
    }
    if damage.len() < *damaged as usize {
        text += &format!("  and {} more\n", *damaged as usize - damage.len());
    }
    show(text)?;
    Ok(())
}

fn show_removed(place: &Place, removed: &Removed) -> CommandResult {
    let Removed { segments, bytes, kept_segments, kept_bytes } = *removed;
    if place.json {
        let object = json!({
            "removed_segments": segments,
            "removed_bytes": bytes,
            "kept_segments": kept_segments,
            "kept_bytes": kept_bytes,
        });
        show(format_args!("{object}\n"))?;
    } else {
        let (removed, kept) = (mib(bytes), mib(kept_bytes));
        show(format_args!("removed {segments} segments, {removed}; {kept_segments} are left, {kept}\n"))?;
    }
    Ok(())
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
