//! `ns-llm cache`: looking after a directory in which KV blocks outlive the process, and the answers beneath them.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use ns_llm::kv_cache_directory::{self, Contents, Damage, PruneLimits, Removed};
use serde_json::{Value, json};

use crate::{CommandResult, show};

#[derive(Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Subcommand)]
enum CacheCommand {
    /// Show what is in the directory, KV and answers; may be used while an engine writes to it
    Stat(Place),
    /// Read every record and check it; fails when something is damaged. May be used while an engine writes
    Verify(Place),
    /// Remove the oldest files; answers last, and all at once
    Prune(PruneOptions),
    /// Remove all KV and all answers
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
            match contents.damaged_in_all() {
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
    if place.json {
        let mut object = as_json(contents);
        object["answers"] = contents.answers.as_deref().map_or(Value::Null, as_json);
        show(format_args!("{object}\n"))?;
        return Ok(());
    }
    let mut text = as_text("blocks ", "of KV", contents);
    if let Some(answers) = &contents.answers {
        text += "\n";
        text += &as_text("answers", "with what makes some invalid", answers);
    }
    show(text)?;
    Ok(())
}

fn as_json(contents: &Contents) -> Value {
    let place = |place: &Damage| json!({ "file": place.file, "offset": place.offset, "reason": place.reason });
    json!({
        "format_version": contents.format_version,
        "has_writer": contents.has_writer,
        "segments": contents.segments,
        "bytes": contents.bytes,
        "records": contents.records,
        "live": contents.live,
        "payload_bytes": contents.payload_bytes,
        "damaged": contents.damaged,
        "damage": contents.damage.iter().map(place).collect::<Vec<_>>(),
        "torn_bytes": contents.torn_bytes,
        "other_versions": contents.other_versions,
        "other_version_bytes": contents.other_version_bytes,
    })
}

/// `kind`: of what the records are.
fn as_text(kind: &str, what: &str, contents: &Contents) -> String {
    let Contents { format_version, has_writer, segments, bytes, records, live, damaged, .. } = contents;
    let mut text = format!(
        "{kind}    {live} in {records} records, {} {what}\n\
         files      {segments} segments of format {format_version}, {}\n\
         writer     {}\n\
         damaged    {damaged}\n",
        mib(contents.payload_bytes),
        mib(*bytes),
        if *has_writer { "an engine has the directory open" } else { "none" },
    );
    if contents.torn_bytes > 0 {
        text += &format!("unfinished {} bytes, which the next opening cuts off\n", contents.torn_bytes);
    }
    if contents.other_versions > 0 {
        let (count, bytes) = (contents.other_versions, mib(contents.other_version_bytes));
        text += &format!("others     {count} segments of other formats, {bytes}\n");
    }
    for place in &contents.damage {
        text += &format!("  {} at byte {}: {}\n", place.file, place.offset, place.reason);
    }
    let num_listed = contents.damage.len() as u64;
    if num_listed < *damaged {
        text += &format!("  and {} more\n", damaged - num_listed);
    }
    text
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
