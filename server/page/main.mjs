/** The frame of the page: its two views, its theme, the server's state, and the key that it may ask for. */

import { Chat } from './chat.mjs';
import { Dashboard } from './dashboard.mjs';
import { ask, hasKey, setKey } from './server.mjs';

const STATE_INTERVAL_MS = 5_000;
const THEMES = ['as the system', 'light', 'dark'];
const get = (id) => document.getElementById(id);

const chat = new Chat({ onUnauthorized: askForKey });
const dashboard = new Dashboard({ onUnauthorized: askForKey });

/* Views: the part of the address behind its # says which. */

const VIEWS = ['chat', 'dashboard'];

function show(name, { focus = false } = {}) {
  for (const view of VIEWS) {
    const isShown = view === name;
    get(`view-${view}`).hidden = !isShown;
    const tab = get(`tab-${view}`);
    tab.setAttribute('aria-selected', String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
    if (isShown && focus) {
      tab.focus();
    }
  }
  document.title = name === 'chat' ? 'ns-llm' : 'ns-llm: dashboard';
  dashboard.setVisible(name === 'dashboard');
}

/** Shows a view, and has the address say so. */
function go(name, options) {
  history.replaceState(null, '', `#${name}`);
  show(name, options);
}

const viewOfAddress = () => (location.hash === '#dashboard' ? 'dashboard' : 'chat');

for (const view of VIEWS) {
  const tab = get(`tab-${view}`);
  tab.addEventListener('click', () => go(view));
  tab.addEventListener('keydown', (event) => {
    if (event.key === 'ArrowRight' || event.key === 'ArrowLeft') {
      go(view === 'chat' ? 'dashboard' : 'chat', { focus: true });
    }
  });
}
addEventListener('hashchange', () => show(viewOfAddress()));

addEventListener('keydown', (event) => {
  const isTyping = event.target instanceof HTMLElement && event.target.matches('input, textarea, select');
  if (event.key === '/' && !isTyping && !get('key-dialog').open) {
    event.preventDefault();
    go('chat');
    get('text').focus();
  }
});

/* Theme. */

let theme = Math.max(0, THEMES.indexOf(localStorage.getItem('ns-llm-theme')));

function useTheme() {
  const name = THEMES[theme];
  if (name === THEMES[0]) {
    delete document.documentElement.dataset.theme;
  } else {
    document.documentElement.dataset.theme = name;
  }
  get('theme').title = `Theme: ${name}`;
  get('theme').querySelector('.sr').textContent = `Theme: ${name}`;
  dashboard.recolor();
}

get('theme').addEventListener('click', () => {
  theme = (theme + 1) % THEMES.length;
  localStorage.setItem('ns-llm-theme', THEMES[theme]);
  useTheme();
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => dashboard.recolor());

/* The key. */

const dialog = get('key-dialog');

function askForKey() {
  if (!dialog.open) {
    get('key-text').value = '';
    dialog.showModal();
  }
}

get('key').addEventListener('click', askForKey);
get('key-cancel').addEventListener('click', () => dialog.close());
get('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  setKey(get('key-text').value.trim(), { keep: get('key-keep').checked });
  get('key-text').value = '';
  dialog.close();
  start();
});

/* The server's state. */

function tell(state, words) {
  get('state').dataset.state = state;
  const element = get('state').querySelector('.words');
  if (element.textContent !== words) {
    element.textContent = words;
  }
}

async function look() {
  try {
    const { ready, reason, queue } = await (await ask('/ready')).json();
    const busy = queue.waiting > 0 ? `, ${queue.waiting} waiting` : '';
    tell(ready ? (queue.waiting > 0 ? 'busy' : 'ready') : 'down', ready ? `ready${busy}` : reason);
    return true;
  } catch (error) {
    if (error.status === 401) {
      tell('unknown', hasKey() ? 'key refused' : 'needs a key');
      return false;
    }
    tell('down', error.status ? error.message : 'not reachable');
    return true;
  }
}

let isAsked = false;

async function start() {
  const isOpen = await look();
  if (!isOpen) {
    if (!isAsked || hasKey()) {
      askForKey();
    }
    isAsked = true;
    return;
  }
  await chat.loadModels();
}

useTheme();
show(viewOfAddress());
await start();
setInterval(() => document.visibilityState === 'visible' && void look(), STATE_INTERVAL_MS);
