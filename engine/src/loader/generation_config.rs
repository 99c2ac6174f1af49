//! `generation_config.json`: how the makers of a model want it sampled, and which tokens end an answer. Only a default:
//! a request overrides every field.

use super::JsonFile;
use crate::config::MAX_EOS_TOKENS;
use crate::error::Result;

/// What the file says; `None` where it says nothing. Ranges are those of a request.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Tokens that end an answer; empty: as `config.json` says.
    pub eos_token_ids: Vec<u32>,
    /// 0 is greedy. `"do_sample": false` makes it 0, `true` without a temperature makes it 1.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// Above 0, to 1.
    pub top_p: Option<f32>,
    /// 0 to 1.
    pub min_p: Option<f32>,
    /// Above 0, to 100.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Checks types and ranges; whether the end tokens are in the vocabulary is for the caller, who knows its size.
    pub fn from_json(file: &JsonFile) -> Result<GenerationConfig> {
        let root = file.object();
        let number = |field, min: f32, max: f32| Ok(root.number(field, min.into()..=max.into())?.map(|x| x as f32));
        let temperature = number("temperature", 0.0, 100.0)?;
        Ok(GenerationConfig {
            eos_token_ids: root.token_ids("eos_token_id", u32::MAX as usize, MAX_EOS_TOKENS)?,
            temperature: match root.boolean("do_sample")? {
                Some(false) => Some(0.0),
                Some(true) => temperature.or(Some(1.0)),
                None => temperature,
            },
            top_k: root.integer("top_k", 0..=u32::MAX.into())?.map(|k| k as u32),
            top_p: number("top_p", f32::MIN_POSITIVE, 1.0)?,
            min_p: number("min_p", 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", f32::MIN_POSITIVE, 100.0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig> {
        GenerationConfig::from_json(&JsonFile::parse("generation_config.json", text.as_bytes())?)
    }

    /// The file of a chat model becomes definite values; one end token and a list of them are the same thing.
    #[test]
    fn reads_every_field() {
        let text = r#"{"do_sample": true, "eos_token_id": [7, 9], "temperature": 0.6, "top_k": 20, "top_p": 0.95,
                       "min_p": 0.05, "repetition_penalty": 1.1, "transformers_version": "4.51.0", "pad_token_id": null}"#;
        let config = parse(text).unwrap();
        assert_eq!(config.eos_token_ids, [7, 9]);
        assert_eq!((config.temperature, config.top_k, config.top_p), (Some(0.6), Some(20), Some(0.95)));
        assert_eq!((config.min_p, config.repetition_penalty), (Some(0.05), Some(1.1)));
        assert_eq!(parse(r#"{"eos_token_id": 3}"#).unwrap().eos_token_ids, [3]);
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    }

    /// `do_sample` decides between greedy and sampling, whatever temperature is written beside it.
    #[test]
    fn do_sample_decides() {
        assert_eq!(parse(r#"{"do_sample": false, "temperature": 0.6}"#).unwrap().temperature, Some(0.0));
        assert_eq!(parse(r#"{"do_sample": true}"#).unwrap().temperature, Some(1.0));
        assert_eq!(parse(r#"{"temperature": 0.6}"#).unwrap().temperature, Some(0.6));
    }

    /// Values outside the ranges of a request are refused by name, one field at a time.
    #[test]
    fn refuses_what_no_request_could_ask() {
        for (field, value) in [
            ("temperature", "-0.1"),
            ("temperature", "101"),
            ("top_k", "-1"),
            ("top_k", "1.5"),
            ("top_p", "0"),
            ("top_p", "1.1"),
            ("min_p", "2"),
            ("repetition_penalty", "0"),
            ("eos_token_id", "-1"),
            ("eos_token_id", "[1, \"2\"]"),
            ("do_sample", "1"),
        ] {
            let e = parse(&format!("{{\"{field}\": {value}}}")).unwrap_err();
            assert!(e.to_string().starts_with(&format!("generation_config.json: field `{field}`: ")), "{value}: {e}");
        }
    }
}
