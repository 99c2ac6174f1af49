//! The files that sentence-transformers puts beside a model (Reimers & Gurevych 2019, arXiv:1908.10084): which modules a
//! text goes through, how its states become one vector, and how long it may be. Only what this engine does itself is
//! accepted: a transformer in the folder itself, a pooling, and scaling to unit length, which is a request's choice.

use super::json::{JsonFile, JsonList, JsonObject};
use crate::error::Result;

/// What the files say; `None` where they say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SentenceConfig {
    /// How the states of a text become its vector.
    pub pooling: Option<PoolingMode>,
    /// Numbers of that vector, as the pooling has it.
    pub word_embedding_dimension: Option<usize>,
    /// Longest text, tokens, special ones included.
    pub max_seq_length: Option<usize>,
}

/// The poolings that can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingMode {
    /// `pooling_mode_mean_tokens`
    MeanTokens,
    /// `pooling_mode_cls_token`
    ClsToken,
    /// `pooling_mode_lasttoken`
    LastToken,
}

/// Where the pooling is described: the name that the library gives it as the second module.
const POOLING_PATH: &str = "1_Pooling";
/// Beyond every published model.
const MAX_SEQ_LENGTH: usize = 1 << 24;
const MAX_DIMENSION: usize = 1 << 16;

impl PoolingMode {
    /// Name as in reports.
    pub fn name(self) -> &'static str {
        match self {
            PoolingMode::MeanTokens => "mean",
            PoolingMode::ClsToken => "cls",
            PoolingMode::LastToken => "last",
        }
    }
}

impl SentenceConfig {
    /// `modules`: `modules.json`; `pooling`: `1_Pooling/config.json`; `transformer`: `sentence_bert_config.json`.
    pub(super) fn read(
        modules: Option<&JsonList>,
        pooling: Option<&JsonFile>,
        transformer: Option<&JsonFile>,
    ) -> Result<SentenceConfig> {
        let mut config = SentenceConfig::default();
        if let Some(modules) = modules {
            let pooling_module = check_modules(modules)?;
            if pooling.is_none() {
                return Err(pooling_module.error("path", format!("is {POOLING_PATH:?}, which has no config.json")));
            }
        }
        if let Some(pooling) = pooling {
            let pooling = pooling.object();
            config.pooling = Some(pooling_mode(&pooling)?);
            config.word_embedding_dimension = pooling.size("word_embedding_dimension", 1..=MAX_DIMENSION)?;
        }
        if let Some(transformer) = transformer {
            let transformer = transformer.object();
            config.max_seq_length = transformer.size("max_seq_length", 1..=MAX_SEQ_LENGTH)?;
            if transformer.boolean("do_lower_case")? == Some(true) {
                let reason = "is true, which is not supported: the tokenizer says what becomes of capitals";
                return Err(transformer.error("do_lower_case", reason));
            }
        }
        Ok(config)
    }
}

/// The pooling module, when the list is one that can be run.
fn check_modules(modules: &JsonList) -> Result<JsonObject<'_>> {
    let mut pooling = None;
    let entries = modules.objects();
    for (idx, module) in entries.iter().enumerate() {
        let kind = module.required("type", module.string("type")?)?;
        let path = module.string("path")?.unwrap_or_default();
        let expected_path = match (idx, kind.rsplit('.').next().unwrap_or(kind)) {
            (0, "Transformer") => "",
            (1, "Pooling") => {
                pooling = Some(module.clone());
                POOLING_PATH
            }
            (2, "Normalize") => path,
            _ => {
                let reason =
                    format!("is {kind:?}, which is not supported there (supported: Transformer, Pooling, Normalize)");
                return Err(module.error("type", reason));
            }
        };
        if path != expected_path {
            return Err(module.error("path", format!("is {path:?}, must be {expected_path:?}")));
        }
    }
    let count = entries.len();
    pooling.ok_or_else(|| modules.error(format!("has {count} modules, must have a Transformer and a Pooling")))
}

/// The one mode that is switched on.
fn pooling_mode(pooling: &JsonObject<'_>) -> Result<PoolingMode> {
    let mut modes = Vec::new();
    // Newer files name it, older ones have a switch for each.
    if let Some(name) = pooling.string("pooling_mode")? {
        modes.push(("pooling_mode", name));
    }
    for field in pooling.names().filter(|name| name.starts_with("pooling_mode_")) {
        if pooling.boolean(field)? == Some(true) {
            modes.push((field, &field["pooling_mode_".len()..]));
        }
    }
    let &[(field, mode)] = modes.as_slice() else {
        let reason = format!("is set in {} ways, must be in one: vectors are not joined", modes.len());
        return Err(pooling.error("pooling_mode", reason));
    };
    match mode {
        "mean" | "mean_tokens" => Ok(PoolingMode::MeanTokens),
        "cls" | "cls_token" => Ok(PoolingMode::ClsToken),
        "lasttoken" => Ok(PoolingMode::LastToken),
        other => {
            let reason = format!("{other:?} is not supported (supported: mean_tokens, cls_token, lasttoken)");
            Err(pooling.error(field, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(modules: Option<Value>, pooling: Option<Value>, transformer: Option<Value>) -> Result<SentenceConfig> {
        let file = |name, value: Value| JsonFile::parse(name, value.to_string().as_bytes());
        let modules = modules.map(|value| JsonList::parse("modules.json", value.to_string().as_bytes())).transpose()?;
        let pooling = pooling.map(|value| file("1_Pooling/config.json", value)).transpose()?;
        let transformer = transformer.map(|value| file("sentence_bert_config.json", value)).transpose()?;
        SentenceConfig::read(modules.as_ref(), pooling.as_ref(), transformer.as_ref())
    }

    fn module(idx: usize, path: &str, kind: &str) -> Value {
        json!({"idx": idx, "name": idx.to_string(), "path": path, "type": format!("sentence_transformers.models.{kind}")})
    }

    fn modules() -> Vec<Value> {
        vec![module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling"), module(2, "2_Normalize", "Normalize")]
    }

    /// A folder of the library becomes definite values; each mode is found by its switch and by its name; a folder
    /// without the files says nothing.
    #[test]
    fn reads_every_mode() {
        let pooling = json!({"word_embedding_dimension": 384, "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false, "include_prompt": true});
        let transformer = json!({"max_seq_length": 256, "do_lower_case": false});
        let whole = read(Some(json!(modules())), Some(pooling), Some(transformer)).unwrap();
        assert_eq!(
            whole,
            SentenceConfig {
                pooling: Some(PoolingMode::MeanTokens),
                word_embedding_dimension: Some(384),
                max_seq_length: Some(256),
            }
        );
        for (pooling, mode) in [
            (json!({"pooling_mode_cls_token": true}), PoolingMode::ClsToken),
            (json!({"pooling_mode_lasttoken": true}), PoolingMode::LastToken),
            (json!({"pooling_mode": "cls"}), PoolingMode::ClsToken),
            (json!({"pooling_mode": "lasttoken"}), PoolingMode::LastToken),
            (json!({"pooling_mode": "mean", "pooling_mode_max_tokens": false}), PoolingMode::MeanTokens),
        ] {
            assert_eq!(read(None, Some(pooling), None).unwrap().pooling, Some(mode));
        }
        assert_eq!(read(None, None, None).unwrap(), SentenceConfig::default());
        assert_eq!(read(None, None, Some(json!({"max_seq_length": null}))).unwrap(), SentenceConfig::default());
    }

    /// What this engine would compute otherwise than the library is refused by file and field.
    #[test]
    fn refuses_by_name() {
        let one = || Some(json!({"pooling_mode_mean_tokens": true}));
        let mut dense = modules();
        dense[2] = module(2, "2_Dense", "Dense");
        let mut inside = modules();
        inside[0] = module(0, "0_BERT", "Transformer");
        let mut outside = modules();
        outside[1] = module(1, "../1_Pooling", "Pooling");
        for (modules, pooling, transformer, error) in [
            (
                Some(json!(dense)),
                one(),
                None,
                "modules.json: field `[2].type`: is \"sentence_transformers.models.Dense\"",
            ),
            (Some(json!(inside)), one(), None, "modules.json: field `[0].path`: is \"0_BERT\", must be \"\""),
            (
                Some(json!(outside)),
                one(),
                None,
                "modules.json: field `[1].path`: is \"../1_Pooling\", must be \"1_Pooling\"",
            ),
            (Some(json!([modules()[1]])), one(), None, "modules.json: field `[0].type`"),
            (Some(json!([modules()[0]])), one(), None, "modules.json: field `(root)`: has 1 modules"),
            (Some(json!([])), one(), None, "modules.json: field `(root)`: has 0 modules"),
            (Some(json!([{"type": 7}])), one(), None, "modules.json: field `[0].type`: is a number, must be a string"),
            (Some(json!({})), one(), None, "modules.json is not valid JSON"),
            (
                Some(json!(modules())),
                None,
                None,
                "modules.json: field `[1].path`: is \"1_Pooling\", which has no config.json",
            ),
            (None, Some(json!({})), None, "1_Pooling/config.json: field `pooling_mode`: is set in 0 ways"),
            (
                None,
                Some(json!({"pooling_mode_max_tokens": true})),
                None,
                "field `pooling_mode_max_tokens`: \"max_tokens\" is not",
            ),
            (
                None,
                Some(json!({"pooling_mode": "weightedmean"})),
                None,
                "field `pooling_mode`: \"weightedmean\" is not",
            ),
            (None, Some(json!({"pooling_mode_mean_tokens": 1})), None, "field `pooling_mode_mean_tokens`: is a number"),
            (
                None,
                Some(json!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true})),
                None,
                "field `pooling_mode`: is set in 2 ways, must be in one",
            ),
            (
                None,
                Some(json!({"pooling_mode": "cls", "word_embedding_dimension": 0})),
                None,
                "`word_embedding_dimension`: is 0",
            ),
            (None, None, Some(json!({"max_seq_length": 0})), "sentence_bert_config.json: field `max_seq_length`: is 0"),
            (None, None, Some(json!({"do_lower_case": true})), "sentence_bert_config.json: field `do_lower_case`"),
        ] {
            let e = read(modules, pooling, transformer).expect_err(error).to_string();
            assert!(e.contains(error), "{e} does not say: {error}");
        }
    }
}
